"""Sinks: where finished chunks go. Nothing is imported here, so that a plan or a driver can name paths without
TensorStore or jax.
"""
