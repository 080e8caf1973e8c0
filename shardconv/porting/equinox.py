"""PyTorch's layers in Equinox, which keeps torch's order of dims; running statistics are in a `State`, beside the model.

A weight-normalised layer may stay one (`eqx.nn.WeightNorm`), or be folded into a plain layer.
"""

from dataclasses import replace

from shardconv.porting.linen import BARE, NOWHERE, THREE
from shardconv.porting.moves import Move
from shardconv.porting.rules import Rule, Table, checked, same, spatial
from shardconv.porting.sizes import ALL

AFFINE = same("weight bias", "weight bias")

# In mode "batch", Equinox divides running statistics by 1 - momentum ** batches; after so many batches that is one in float32.
MANY_BATCHES = "1073741824"
STATISTICS = {
    'mode="batch"': (
        *same("running_mean running_var", "batch_state_index.0 batch_state_index.1"),
        Move(MANY_BATCHES, ALL, "batch_counter", ALL),
    ),
    'mode="ema"': (
        *same("running_mean running_var", "ema_state_index.0 ema_state_index.1"),
        Move("0", ALL, "ema_first_time_index", ALL),
    ),
}
BATCH_NORM = tuple(Rule(AFFINE + rows, mode, ("num_batches_tracked",)) for mode, rows in STATISTICS.items())

QKV = "query key value".split()
ATTENTION = (
    *(Move("in_proj_weight", "(o | o | o) i", f"{name}_proj.weight", "o i", part) for part, name in enumerate(QKV)),
    *same("q_proj_weight k_proj_weight v_proj_weight", "query_proj.weight key_proj.weight value_proj.weight"),
    *(Move("in_proj_bias", "(o | o | o)", f"{name}_proj.bias", "o", part) for part, name in enumerate(QKV)),
    *same("out_proj.weight out_proj.bias", "output_proj.weight output_proj.bias"),
)


def weight_normed(rule: Rule) -> Rule:
    """The same layer inside `eqx.nn.WeightNorm`, from a weight-normalised one."""
    rows = tuple(replace(row, source=row.source.replace("weight", "weight_v"), target=f"layer.{row.target}") for row in rule.rows)
    return Rule((*rows, *same("weight_g", "g")), "WeightNorm")


def conv(rank: int) -> tuple[Rule, ...]:
    """A convolution: a bias has a dim for each of space."""
    plain = Rule(spatial(rank, [("weight", "o i *", "weight", "o i *"), ("bias", "o", "bias", "o 1*")]))
    return (plain, weight_normed(plain))


def conv_transpose(rank: int) -> tuple[Rule, ...]:
    """A transposed convolution: as the convolution that it is the transpose of, with the kernel turned round; groups are the outer axis."""
    rows = [("flip(weight)", "(groups i) o *", "weight", "(groups o) i *"), ("bias", "o", "bias", "o 1*")]
    return (Rule(spatial(rank, rows), rare=True),)


LINEAR = Rule(AFFINE)
PRELU = (("1", "negative_slope", ""), *(("c", "negative_slope", "c" + " 1" * rank) for rank in (0, 1, 2, 3)))
RULES = {
    "Linear": (LINEAR, weight_normed(LINEAR), *BARE["Linear"]),
    "Conv1D": (Rule((Move("weight", "i o", "weight", "o i"), *same("bias", "bias")), rare=True),),
    "Embedding": (Rule(AFFINE[:1]), *BARE["Embedding"]),
    **{f"Conv{rank}d": conv(rank) for rank in (1, 2, 3)},
    **{f"ConvTranspose{rank}d": conv_transpose(rank) for rank in (1, 2, 3)},
    **{f"BatchNorm{rank}d": BATCH_NORM for rank in (1, 2, 3)},
    **{f"InstanceNorm{rank}d": (Rule(AFFINE), *BATCH_NORM) for rank in (1, 2, 3)},  # with running statistics: batch norm
    "SyncBatchNorm": BATCH_NORM,
    "LayerNorm": (Rule(AFFINE), *BARE["LayerNorm"]),
    "GroupNorm": (Rule(AFFINE),),
    "RMSNorm": (Rule(AFFINE[:1]), *BARE["RMSNorm"]),
    "MultiheadAttention": (Rule(ATTENTION),),
    "LSTM": (Rule(same("weight_ih weight_hh sum(bias_ih,bias_hh)", "weight_ih weight_hh bias")),),
    "GRU": (
        Rule(
            (
                *same("weight_ih weight_hh", "weight_ih weight_hh"),
                Move("sum(bias_ih, bias_hh)", THREE, "bias", THREE, 0, 0),
                Move("sum(bias_ih, bias_hh)", THREE, "bias", THREE, 1, 1),
                Move("bias_ih", THREE, "bias", THREE, 2, 2),
                Move("bias_hh", THREE, "bias_n", "hidden", 2),
            )
        ),
    ),
    # Slopes are broadcast against one input: a scalar, or a dim for channels and one for each of space.
    "PReLU": tuple(Rule((Move("weight", *dims),)) for dims in PRELU),
}
NORMS = tuple(f"{norm}Norm{rank}d" for norm in ("Batch", "Instance") for rank in (1, 2, 3))
CLASSES = {
    **{name: (name,) for name in RULES if not name.endswith("Norm")},
    "Linear": ("Linear", "Conv1D"),
    "BatchNorm": ("SyncBatchNorm", *NORMS),
    "GroupNorm": ("GroupNorm", *NORMS[3:]),
    "LayerNorm": ("LayerNorm",),
    "RMSNorm": ("RMSNorm",),
    "WeightNorm": ("Linear", "Conv1d", "Conv2d", "Conv3d"),
    "LSTMCell": ("LSTM",),
    "GRUCell": ("GRU",),
}
TABLE = checked(Table("Equinox", RULES, CLASSES, NOWHERE))
