"""PyTorch's layers in Flax Linen. Space comes before channels, kernels multiply from the right, running statistics are in `batch_stats`.

What the layers must be made with is not in the arrays: epsilon (1e-5 is torch's default, 1e-6 Flax's), and what `conventions` computes.
"""

from dataclasses import replace

from shardconv.porting.moves import Move
from shardconv.porting.rules import Rule, Table, checked, gates, same, spatial
from shardconv.porting.sizes import ALL

LINEAR = (Move("weight", "o i", "kernel", "i o"), *same("bias", "bias"))

# A Linear whose vectors are heads side by side, as one with heads as an axis: DenseGeneral, and the parts of Flax's attention.
HEADS_OUT = (
    Move("weight", "(heads head_dim) embed", "kernel", "embed heads head_dim"),
    Move("bias", "(heads head_dim)", "bias", "heads head_dim"),
)
HEADS_IN = (Move("weight", "embed (heads head_dim)", "kernel", "heads head_dim embed"), *same("bias", "bias"))

# Parameters of a module without layers: the array itself is the weight.
BARE = {
    "Linear": (
        Rule((Move("weight", "o i", "", "i o"),), "input times array"),
        Rule((Move("weight", "o i", "", "o i"),), "array times input"),
        Rule((Move("weight", "(heads head_dim) embed", "", "embed heads head_dim"),), "input times array, heads"),
        Rule((Move("weight", "embed (heads head_dim)", "", "heads head_dim embed"),), "heads times array"),
    ),
    **{kind: (Rule((Move("weight", ALL, "", ALL),)),) for kind in ("Embedding", "LayerNorm", "RMSNorm")},
}
AFFINE = same("weight bias", "scale bias")
BATCH_NORM = Rule(AFFINE + same("running_mean running_var", "mean var"), unused=("num_batches_tracked",))

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


# What no JAX library's layer has, by torch's class and tensor.
NOWHERE = {
    "LSTM.weight_hr": "its cells have no projection (proj_size): write the cell with one",
    "MultiheadAttention.bias_k": "its attention has no key and value of its own (add_bias_kv): write the layer with them",
}


def weight_normed(rows: tuple[Move, ...]) -> tuple[Rule, ...]:
    """The same layer in a `WeightNorm`, from a weight-normalised one: torch's dim 0, 1 or none are feature axis -1, -2 or none.

    Linen keeps a layer beside its `WeightNorm` or inside it, NNX inside; the scale is named by the kernel (`shardconv.porting.trees`).
    """
    kernel, *rest = rows
    found = []
    for axis, form in (("o", "-1"), ("i", "-2"), ("", "None")):
        lengths = " ".join(dim if dim == axis else "1" for dim in kernel.dims.split()) if axis else ""
        stored = (replace(kernel, source="weight_v"), *rest, Move("weight_g", lengths, "kernel/scale", axis))
        for place in ("", "layer_instance."):
            moved = tuple(replace(row, target=place + row.target) for row in stored)
            found.append(Rule(moved, f"WeightNorm, feature_axes={form}"))
    return tuple(found)


def conv(rank: int) -> tuple[Rule, ...]:
    """A convolution; of a grouped one torch and Flax both keep the inputs of one group."""
    rows = spatial(rank, [("weight", "o i *", "kernel", "* i o"), ("bias", "o", "bias", "o")])
    return (Rule(rows), *weight_normed(rows))


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


FOUR, THREE = "(hidden | hidden | hidden | hidden)", "(hidden | hidden | hidden)"


def biased(rows: tuple[Move, ...], biases: tuple[Move, ...], form: str = "") -> tuple[Rule, ...]:
    """A cell that always has biases: from torch's, and from a layer without any, where they are zeros."""
    zeros = tuple(Move("0", ALL, target, ALL) for target in dict.fromkeys(row.target for row in biases))
    return (Rule(rows + biases, form), Rule(rows + zeros, f"{form}, biases of zeros".removeprefix(", ")))


LSTM = biased(
    (
        *gates("weight_ih", f"{FOUR} input", "ii.kernel if.kernel ig.kernel io.kernel", "input hidden"),
        *gates("weight_hh", f"{FOUR} from", "hi.kernel hf.kernel hg.kernel ho.kernel", "from hidden"),
    ),
    gates("sum(bias_ih, bias_hh)", FOUR, "hi.bias hf.bias hg.bias ho.bias", "hidden"),
)
GRU = biased(
    (
        *gates("weight_ih", f"{THREE} input", "ir.kernel iz.kernel in.kernel", "input hidden"),
        *gates("weight_hh", f"{THREE} from", "hr.kernel hz.kernel hn.kernel", "from hidden"),
    ),
    (
        *gates("sum(bias_ih, bias_hh)", THREE, "ir.bias iz.bias", "hidden"),
        Move("bias_ih", THREE, "in.bias", "hidden", part=2),
        Move("bias_hh", THREE, "hn.bias", "hidden", part=2),
    ),
)
RULES = {
    "Linear": (Rule(LINEAR), *weight_normed(LINEAR), Rule(HEADS_OUT, "heads come out"), Rule(HEADS_IN, "heads go in"), *BARE["Linear"]),
    "Conv1D": (Rule(same("weight bias", "kernel bias"), rare=True),),  # transformers' Linear, with its weight the other way round
    "Embedding": (Rule(same("weight", "embedding")), *BARE["Embedding"]),
    **{f"Conv{rank}d": conv(rank) for rank in (1, 2, 3)},
    **{f"ConvTranspose{rank}d": conv_transpose(rank) for rank in (1, 2, 3)},
    **{f"BatchNorm{rank}d": (BATCH_NORM,) for rank in (1, 2, 3)},
    **{f"InstanceNorm{rank}d": (BATCH_NORM,) for rank in (1, 2, 3)},  # with running statistics it computes what batch norm does
    "SyncBatchNorm": (BATCH_NORM,),
    "LayerNorm": (Rule(AFFINE), *BARE["LayerNorm"]),
    "GroupNorm": (Rule(AFFINE),),
    "RMSNorm": (Rule(AFFINE[:1]), *BARE["RMSNorm"]),
    "MultiheadAttention": (Rule(ATTENTION),),
    "LSTM": LSTM,
    "GRU": GRU,
    "PReLU": (Rule((Move("weight", "1", "negative_slope", ""),)),),
}
LACKS = {"PReLU": "its PReLU has one slope for all channels", **NOWHERE}
TABLE = checked(Table("Flax Linen", RULES, lacks=LACKS))
