"""What a plan says of how values are rounded, for the floor of the logits: nothing that is compared comes from here."""

from shardconv.plan import Plan
from shardconv.verify.reference import Rounding


def roundings(plan: Plan) -> dict[str, Rounding]:
    """How each tensor of the source is rounded, by its name; those that keep their values are left out."""
    return {
        key: Rounding(leaf.dtype, part.rule.scale, part.rule.shift)
        for leaf in plan.leaves
        if not leaf.exact
        for part in leaf.parts
        for key, _ in part.source.keys()
    }
