"""Layouts: where JAX code bases want each parameter. A layout is a function from a model and the user's options to a table."""

from collections.abc import Callable, Mapping

from shardconv.family import Layout, LayoutOptions, Model
from shardconv.layouts import flat, maxtext

LAYOUTS: Mapping[str, Callable[[Model, LayoutOptions], Layout]] = {"flat": flat.layout, "maxtext": maxtext.layout}
