"""A decoder of our own in JAX, to ask a written checkpoint what it thinks.

    config.json --hf--> Decoder --a reader--> Reading --weights--> arrays --decoder--> logits

`hf` says what the model computes, in the words of its config.json. A *reader* says how the code base that will load the checkpoint finds
each array and what it no longer does at run time since the stored values carry it. `decoder` computes, one block at a time.

Nothing here knows how the checkpoint was made: no axes, routes, families or layouts are imported, and a test sees to it. What a layout's
code base expects is written down in its reader a second time, so that a table which is wrong gives wrong logits.
"""
