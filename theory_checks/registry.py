"""The checks in the order in which they are shown: the density, the law it is, the boundary, inference."""

from collections.abc import Sequence

from theory_checks.check import Check
from theory_checks.claims import (
    boundedness,
    certified_radius,
    change_of_variables,
    conditioning,
    finite,
    gaussian_limit,
    invariance,
    kolmogorov,
    low_rank_identity,
    map_equivalence,
    normalisation,
    safe_region,
    sampler_law,
    support_tokens,
)

CHECKS: tuple[Check, ...] = (
    change_of_variables.CHECK,
    low_rank_identity.CHECK,
    invariance.CHECK,
    finite.CHECK,
    normalisation.CHECK,
    kolmogorov.CHECK,
    sampler_law.CHECK,
    gaussian_limit.CHECK,
    safe_region.CHECK,
    conditioning.CHECK,
    certified_radius.CHECK,
    support_tokens.CHECK,
    map_equivalence.CHECK,
    boundedness.CHECK,
)


def select(ids: Sequence[str]) -> tuple[Check, ...]:
    """The checks with these ids in the order of the table, all of them for no ids; ValueError for an unknown id."""
    known = [check.id for check in CHECKS]
    unknown = [name for name in ids if name not in known]
    if unknown:
        raise ValueError(f"--only: unknown id {', '.join(map(repr, unknown))}; known ids: {', '.join(known)}.")
    return tuple(check for check in CHECKS if not ids or check.id in ids)
