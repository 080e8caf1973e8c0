"""The proof: what was written is read back and compared with the source, by code that shares nothing with the code that wrote it.

Round trips prove nothing, since a table that is wrong in both directions cancels out. So everything here is said a second time:

    tensors     a safetensors reader of its own
    statement   where each leaf comes from: whole source tensors and an einops pattern
    maxtext     MaxText's tables, transcribed from its own names and shapes
    flat        the flat layout, derived from the roles of the tensors
    rounding    casts by their definition, not by the library that made them

    compare     two arrays bit by bit, and what stands where they differ
    causes      which simple mistake explains a difference
    stored      the checkpoint, through TensorStore
    look        one task of a worker: some boxes of one leaf
    weights     the whole check: tasks, workers, verdict

The first five import nothing of shardconv but its errors and each other; a test walks the imports. A family that nobody has stated twice is
compared by the plan's own addresses (`addresses`), evaluated by other code, and the verdict says so.
"""
