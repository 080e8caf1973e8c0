"""PyTorch's layers in Flax Linen. Space comes before channels, kernels multiply from the right, running statistics are in `batch_stats`.

What the layers must be made with is not in the arrays: epsilon (1e-5 is torch's default, 1e-6 Flax's), and what `conventions` computes.
"""

from shardconv.porting.moves import Move
from shardconv.porting.rules import Rule, Table, checked, gates, same, spatial

LINEAR = (Move("weight", "o i", "kernel", "i o"), *same("bias", "bias"))
AFFINE = same("weight bias", "scale bias")
STATISTICS = same("running_mean running_var", "mean var")

# torch's attention has query, key and value in one tensor, or in three where they come from vectors of different lengths.
QKV = "query key value".split()
PACKED = "((heads | heads | heads) head_dim)"
ATTENTION = (
    *(Move("in_proj_weight", f"{PACKED} embed", f"{name}.kernel", "embed heads head_dim", part) for part, name in enumerate(QKV)),
    *(Move(f"{name[0]}_proj_weight", "(heads head_dim) embed", f"{name}.kernel", "embed heads head_dim") for name in QKV),
    *(Move("in_proj_bias", PACKED, f"{name}.bias", "heads head_dim", part) for part, name in enumerate(QKV)),
    Move("out_proj.weight", "embed (heads head_dim)", "out.kernel", "heads head_dim embed"),
    Move("out_proj.bias", "embed", "out.bias", "embed"),
)


def conv(rank: int) -> tuple[Rule, ...]:
    """A convolution; of a grouped one torch and Flax both keep the inputs of one group."""
    return (Rule(spatial(rank, [("weight", "o i *", "kernel", "* i o"), ("bias", "o", "bias", "o")])),)


def conv_transpose(rank: int) -> tuple[Rule, ...]:
    """A transposed convolution; Flax has no groups there."""

    def form(name: str, source: str, to: str) -> Rule:
        return Rule(spatial(rank, [(source, "i o *", "kernel", to), ("bias", "o", "bias", "o")]), name, rare=True)

    return (
        form("transpose_kernel=True", "weight", "* o i"),
        form("transpose_kernel=False", "flip(weight)", "* i o"),
        form("transpose_kernel=True, of groups", "block_diagonal(weight)", "* o i"),
        form("transpose_kernel=False, of groups", "block_diagonal(flip(weight))", "* i o"),
    )


LSTM = Rule(
    (
        *gates("weight_ih", "(hidden | hidden | hidden | hidden) input", "ii.kernel if.kernel ig.kernel io.kernel", "input hidden"),
        *gates("weight_hh", "(hidden | hidden | hidden | hidden) from", "hi.kernel hf.kernel hg.kernel ho.kernel", "from hidden"),
        *gates("sum(bias_ih, bias_hh)", "(hidden | hidden | hidden | hidden)", "hi.bias hf.bias hg.bias ho.bias", "hidden"),
    )
)
GRU = Rule(
    (
        *gates("weight_ih", "(hidden | hidden | hidden) input", "ir.kernel iz.kernel in.kernel", "input hidden"),
        *gates("weight_hh", "(hidden | hidden | hidden) from", "hr.kernel hz.kernel hn.kernel", "from hidden"),
        *gates("sum(bias_ih, bias_hh)", "(hidden | hidden | hidden)", "ir.bias iz.bias", "hidden"),
        Move("bias_ih", "(hidden | hidden | hidden)", "in.bias", "hidden", part=2),
        Move("bias_hh", "(hidden | hidden | hidden)", "hn.bias", "hidden", part=2),
    )
)
RULES = {
    "Linear": (Rule(LINEAR),),
    "Conv1D": (Rule(same("weight bias", "kernel bias"), rare=True),),  # transformers' Linear, with its weight the other way round
    "Embedding": (Rule(same("weight", "embedding")),),
    **{f"Conv{rank}d": conv(rank) for rank in (1, 2, 3)},
    **{f"ConvTranspose{rank}d": conv_transpose(rank) for rank in (1, 2, 3)},
    **{f"BatchNorm{rank}d": (Rule(AFFINE + STATISTICS, unused=("num_batches_tracked",)),) for rank in (1, 2, 3)},
    **{f"InstanceNorm{rank}d": (Rule(AFFINE),) for rank in (1, 2, 3)},
    "SyncBatchNorm": (Rule(AFFINE + STATISTICS, unused=("num_batches_tracked",)),),
    "LayerNorm": (Rule(AFFINE),),
    "GroupNorm": (Rule(AFFINE),),
    "RMSNorm": (Rule(AFFINE[:1]),),
    "MultiheadAttention": (Rule(ATTENTION),),
    "LSTM": (LSTM,),
    "GRU": (GRU,),
    "PReLU": (Rule((Move("weight", "1", "negative_slope", ""),)),),
}
LACKS = {"PReLU": "its PReLU has one slope for all channels"}
TABLE = checked(Table("Flax Linen", RULES, lacks=LACKS))
