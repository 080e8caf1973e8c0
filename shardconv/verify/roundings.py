"""What a plan says of how values are rounded, so that the logits' reference can be rounded alike.

Only the rounding is taken over: the reference undoes the scale and the shift, so a wrong one is a difference as before.
"""

from shardconv.plan import Plan
from shardconv.verify.logit_request import Rounding


def roundings(plan: Plan) -> dict[str, Rounding]:
    """How each tensor of the source is rounded, by its name; those that keep their values are left out."""
    return {
        key: Rounding(leaf.dtype, part.rule.scale, part.rule.shift)
        for leaf in plan.leaves
        if not leaf.exact
        for part in leaf.parts
        for key, _ in part.source.keys()
    }
