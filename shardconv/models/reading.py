"""Readers by layout, and what every reader must come to: each role of the model found, each leaf of the checkpoint read."""

from collections.abc import Callable, Collection, Iterator, Mapping

from shardconv.errors import CheckError, ConfigError, Problem
from shardconv.models import flat, maxtext
from shardconv.models.description import Decoder, Reading

Reader = Callable[[Decoder, Collection[str], bool, str], Reading]

READERS: Mapping[str, Reader] = {"flat": flat.read, "maxtext": maxtext.read}


def read(layout: str, decoder: Decoder, names: Collection[str], *, scanned: bool, rope: str) -> Reading:
    """How a layout's code base reads a checkpoint with leaves of these dotted names.

    `rope` is the order of rotary dims that the user asked for: "half", "interleaved", or "auto" for what the code base takes by itself.
    Raises ConfigError for a layout without a reader, CheckError with every role that has no leaf and every leaf that nobody reads.
    """
    if layout not in READERS:
        problem = Problem(f"there is no reader for the layout {layout!r}", 'set check.mode = "weights"')
        raise ConfigError("there is no JAX forward for this checkpoint", [problem])
    reading = READERS[layout](decoder, names, scanned, rope)
    if problems := list(_gaps(reading, names)):
        raise CheckError(f"the checkpoint is not what {layout} code reads", problems)
    return reading


def _gaps(reading: Reading, names: Collection[str]) -> Iterator[Problem]:
    decoder = reading.decoder
    missing = dict.fromkeys(sorted(decoder.end_roles - reading.ends.keys()), "the checkpoint")
    for layer, block in enumerate(reading.blocks):
        for role in sorted(decoder.block_roles - block.keys()):
            missing.setdefault(role, f"layer {layer}")
    yield from (Problem(f"{where} has no {role}") for role, where in missing.items())
    known = {place.leaf for block in reading.blocks for role, place in block.items() if role in decoder.block_roles}
    known |= {place.leaf for role, place in reading.ends.items() if role in decoder.end_roles | {"unembed"}}
    for name in sorted(set(names) - known):
        yield Problem(f"{name} is in the checkpoint, and a {decoder.name} model has no use for it")
