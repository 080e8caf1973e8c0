"""PyTorch's layers in Flax NNX: as in Linen, but for recurrent cells."""

from dataclasses import replace

from shardconv.porting.linen import FOUR, LACKS, RULES, THREE, biased
from shardconv.porting.moves import Move
from shardconv.porting.rules import Table, Zero, checked, gates, same

OPTIMIZED_LSTM = biased(
    (
        Move("weight_ih", "gates input", "dense_i.kernel", "input gates"),
        Move("weight_hh", "gates from", "dense_h.kernel", "from gates"),
    ),
    same("sum(bias_ih,bias_hh)", "dense_h.bias"),
    "OptimizedLSTMCell",
)
LSTM = biased(
    (
        *gates("weight_ih", f"{FOUR} input", "ii.kernel if_.kernel ig.kernel io.kernel", "input hidden"),
        *gates("weight_hh", f"{FOUR} from", "hi.kernel hf.kernel hg.kernel ho.kernel", "from hidden"),
    ),
    gates("sum(bias_ih, bias_hh)", FOUR, "hi.bias hf.bias hg.bias ho.bias", "hidden"),
    "LSTMCell",
)
WHY = "nnx.GRUCell has no bias on what the reset gate multiplies; use linen.GRUCell or equinox.nn.GRUCell, or write the cell with one"
BIASED_GRU, ZERO_GRU = biased(
    (
        Move("weight_ih", "gates input", "dense_i.kernel", "input gates"),
        Move("weight_hh", "gates from", "dense_h.kernel", "from gates"),
    ),
    (
        Move("sum(bias_ih, bias_hh)", THREE, "dense_i.bias", THREE, 0, 0),
        Move("sum(bias_ih, bias_hh)", THREE, "dense_i.bias", THREE, 1, 1),
        Move("bias_ih", THREE, "dense_i.bias", THREE, 2, 2),
    ),
)
GRU = (replace(BIASED_GRU, zeros=(Zero("bias_hh", THREE, 2, WHY),)), ZERO_GRU)
INSTANCE_NORMS = ("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d")
CLASSES = {
    "Linear": ("Linear", "Conv1D"),
    "LinearGeneral": ("Linear",),
    "Conv": ("Conv1d", "Conv2d", "Conv3d"),
    "ConvTranspose": ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"),
    "Embed": ("Embedding",),
    "BatchNorm": ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", *INSTANCE_NORMS),
    "InstanceNorm": INSTANCE_NORMS,
    "WeightNorm": ("Linear", "Conv1d", "Conv2d", "Conv3d"),
    **{name: (name,) for name in ("LayerNorm", "GroupNorm", "RMSNorm", "PReLU")},
    "MultiHeadAttention": ("MultiheadAttention",),
    "OptimizedLSTMCell": ("LSTM",),
    "LSTMCell": ("LSTM",),
    "GRUCell": ("GRU",),
}
TABLE = checked(Table("Flax NNX", {**RULES, "LSTM": (*OPTIMIZED_LSTM, *LSTM), "GRU": GRU}, CLASSES, LACKS))
