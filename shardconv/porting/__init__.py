"""Porting: a PyTorch model's parameters onto a user's own JAX model, in Flax Linen, Flax NNX, Equinox or plain trees.

    sizes         lengths of axes, from dims and shapes
    folding       what no address can say: sums, norms folded into weights, kernels turned round
    moves         what fills an array, as two addresses: `fc.weight: o i -> i o`
    rules         layers as moves; the tables are `linen`, `nnx` and `equinox`
    layers        a state dict taken apart into layers
    landing       arrays made of tensors
    sources       tensors, of a module or a state dict; `trees`, arrays of the user's model and back
    mapping       what a user says of which part is which; `matching`, what is proposed where nobody does
    stacks        layers that a model keeps in one array; `bare`, parameters that are in no layer
    uses          what a model does with its arrays, from one run: `torch_uses`, `jax_uses`; `flow`, what two runs have in common
    flattening    where channels may be flattened in another order
    resolving     all of that made into moves, and everything that is wrong
    agreement     whether a converted model computes what PyTorch's does; `unseen`, what no comparison of results can show
    epsilons      a warning of what no array shows
    convert       `shardconv.convert_module` and `shardconv.propose_mapping`
    conventions   what layers must be made with; `pooling`, averages as torch takes them
"""
