"""The plain layout: nested canonical names, kernels [in, out], heads apart, nothing folded into values.

`layers.{layers}.attn.q` with dims `embed heads head_dim`; scanned, `layers.attn.q` with `layers` as the first dim. Experts are stacked
after `layers`. It is derived from the family's own rows, so that a new family has it for free: a fused tensor is taken apart, the axes of
a dim become dims. Values keep their bits; what a reader applies at run time (a query scale, 1 + w, an embedding scale) is in the
checkpoint's metadata, with the order of the rotary dims, which is the checkpoint's ("half") unless `target.rope` says otherwise.
"""

from shardconv.family import Layout, LayoutOptions, Model, Param, Slot
from shardconv.layouts.options import fitted


def layout(model: Model, options: LayoutOptions) -> Layout:
    """The flat layout of a model; raises InputError where the options cannot be had."""
    slots = tuple(_slot(param, model, options.scan_layers) for param in model.params)
    notes = ("target.query_dtype changes nothing: this layout folds no scale into the query",) if options.query_dtype else ()
    rope = "half" if options.rope == "auto" else options.rope
    return fitted(Layout("flat", slots, metadata=model.facts, notes=notes), model, options, rope)


def _slot(param: Param, model: Model, scanned: bool) -> Slot:
    address = param.address(model.axes)
    dims = [[digit.axis for digit in dim] for dim in address.dims]
    if param.linear:
        dims = [*dims[1:], dims[0]]
    axes = [axis for axis in address.named if axis != "layers"] + [axis for dim in dims for axis in dim]
    if not param.name.startswith("layers."):
        return Slot(param.name, param.name, " ".join(axes))
    if scanned:
        return Slot(param.name, param.name, " ".join(["layers", *axes]))
    return Slot(param.name, param.name.replace("layers.", "layers.{layers}.", 1), " ".join(axes))
