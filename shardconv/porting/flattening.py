"""Flattening: where a convolution's result may be flattened before a fully connected layer, which no shape and no name shows.

torch flattens (channel, height, width), a model with channels last (height, width, channel), unless it turns back before. Where both runs
have been followed, `flow` knows. Where not, it is only to be suspected: the first Linear after a convolution takes several times as many
numbers as that has channels. After an average over all places it takes just as many, and nothing is said.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from shardconv.porting.rules import Choice

AXES = {3: "c w", 4: "c h w", 5: "c d h w"}  # of what is flattened, by the rank of the convolution's kernel
BETWEEN = ("BatchNorm", "SyncBatchNorm", "InstanceNorm", "GroupNorm", "LayerNorm", "RMSNorm", "PReLU")  # with neither, nothing is known


@dataclass(frozen=True)
class Suspect:
    """An array whose inputs may be flattened channels, and lines of a mapping: for a model that has these last, and for any other."""

    target: str
    channels: int
    line: str
    plain: str

    @property
    def said(self) -> str:
        """What is suspected, in a sentence."""
        return f"if this takes {self.channels} flattened channels, and the model has channels last, the line is {self.line}"

    @property
    def remark(self) -> tuple[str, ...]:
        """What a mapping leaves to who edits it: both lines, of which one is to be taken."""
        case = f"if this takes {self.channels} flattened channels, and the model has channels last"
        return f"in doubt: {case}, take the first line, with its sizes; if not, the second", self.line, self.plain


def suspects(choices: Mapping[str, Choice | None]) -> dict[str, Suspect]:
    """Arrays that may need another line, by name; `choices` are the layers in the order of the checkpoint."""
    found: dict[str, Suspect] = {}
    channels, axes = 0, ""
    for choice in choices.values():
        kind = choice.kind if choice is not None else ""
        weight = next((move for move in choice.moves if len(move.source.shape) > 1), None) if choice is not None else None
        if weight is not None and kind in ("Conv1d", "Conv2d", "Conv3d", "Linear"):
            if kind == "Linear":
                inputs = weight.source.shape[1]
                if channels and inputs > channels and inputs % channels == 0 and weight.move.dims == "o i":
                    turned = weight.move.to.replace("i", f"({axes.removeprefix('c ')} c)")
                    sizes = ", ".join([f"c={channels}", *(f"{axis}=.." for axis in axes.split()[1:-1])])
                    text = f'"{weight.move.target}" = "{weight.move.source}: o ({axes}) -> {turned}; {sizes}"'
                    plain = f'"{weight.move.target}" = "{weight.move}"'
                    found[weight.move.target] = Suspect(weight.move.target, channels, text, plain)
                channels = 0
            else:
                is_turned = weight.move.dims != weight.move.to
                channels, axes = (weight.source.shape[0] if is_turned else 0), AXES[len(weight.source.shape)]
        elif not kind.startswith(BETWEEN):
            channels = 0
    return found
