"""One claim a file, in the order in which they are shown: the density, the law it is, the boundary, inference."""

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
    token_consistency,
)

CHECKS: tuple[Check, ...] = (
    change_of_variables.CHECK,
    low_rank_identity.CHECK,
    invariance.CHECK,
    finite.CHECK,
    normalisation.CHECK,
    kolmogorov.CHECK,
    token_consistency.CHECK,
    sampler_law.CHECK,
    gaussian_limit.CHECK,
    safe_region.CHECK,
    conditioning.CHECK,
    certified_radius.CHECK,
    support_tokens.CHECK,
    map_equivalence.CHECK,
    boundedness.CHECK,
)


def select(ids: Sequence[str]) -> list[Check]:
    """The checks with these ids, those of inference among them; the claims above for no ids.

    Raises ValueError for an unknown id.
    """
    if not ids:
        return list(CHECKS)
    from benchmarks.result_tables import chosen
    from theory_checks import inference

    return chosen("--only", ids, {check.id: check for check in (*CHECKS, *inference.CHECKS)})
