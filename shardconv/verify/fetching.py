"""Arrays of the written checkpoint on the mesh one by one, each read when a step of the forward needs it.

What Orbax restores whole is read here by TensorStore in slices: of a leaf that stacks layers only one layer's part, and of that each
device's part only, in the sharding that the plan gives the leaf, less the layer axis.
"""

from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import NamedSharding, PartitionSpec

from shardconv.models.decoder import Weights
from shardconv.models.description import Place, Reading
from shardconv.verify.restoring import Described, readable
from shardconv.verify.stored import Box, Stored

Array = npt.NDArray[Any]


def weights_on_demand(reading: Reading, described: Described) -> Weights:
    """Weights that are read from the checkpoint each time they are asked for; raises CheckError where it cannot be opened."""
    stored = Stored(described.path)
    return Weights(reading, lambda place: fetch(stored, described, place))


def fetch(stored: Stored, described: Described, place: Place) -> jax.Array:
    """The array of a place."""
    leaf = described.leaves[place.leaf]
    shape, sharding = leaf.shape, leaf.sharding
    if place.index is not None:
        shape = shape[: place.axis] + shape[place.axis + 1 :]
        sharding = _without(leaf, place.axis)
    read: dict[Box, Array] = {}

    def part(index: tuple[slice, ...] | None) -> Array:
        assert index is not None
        box: Box = tuple(side.indices(size)[:2] for side, size in zip(index, shape, strict=True))
        if box not in read:  # devices that hold copies share one
            read[box] = _read(stored, place, box)
        return read[box]

    array: jax.Array = jax.block_until_ready(jax.make_array_from_callback(shape, sharding, part))
    return array


def _read(stored: Stored, place: Place, box: Box) -> Array:
    with readable(stored.folder):
        if place.index is None:
            return np.array(stored.read(place.leaf, box))
        whole = (*box[: place.axis], (place.index, place.index + 1), *box[place.axis :])
        return np.array(stored.read(place.leaf, whole)).squeeze(place.axis)


def _without(leaf: jax.ShapeDtypeStruct, axis: int) -> NamedSharding:
    """The sharding of a leaf's slice across `axis`."""
    sharding = leaf.sharding
    assert isinstance(sharding, NamedSharding)
    entries = [*sharding.spec, *[None] * (len(leaf.shape) - len(sharding.spec))]
    return NamedSharding(sharding.mesh, PartitionSpec(*entries[:axis], *entries[axis + 1 :]))
