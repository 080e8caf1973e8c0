"""Leaves straight onto a `jax.sharding.Mesh`: two ways to lay them out, which of them a leaf takes, and `load`, which writes nothing."""
