"""Which code computes, one choice made by the same argument everywhere, and what either computes."""

from typing import Literal, NamedTuple, get_args

from jaxtyping import Array, Float

Implementation = Literal["reference", "blocked"]


def is_blocked(implementation: Implementation | None) -> bool:
    """Whether the blocked kernels are asked for; None is the reference. Raises ValueError for another name.

    The reference alone has derivatives in forward mode. The blocked one has a gradient, and forward derivatives of it.
    """
    if implementation is not None and implementation not in get_args(Implementation):
        raise ValueError(
            f"implementation: got {implementation!r}; pass None or one of {', '.join(get_args(Implementation))}."
        )
    return implementation == "blocked"


class ResidualAndLogDet(NamedTuple):
    """Residual e (..., n, d), sign of det J_i (..., n) and log|det J_i| (..., n) in nats."""

    residual: Float[Array, "... n d"]
    sign: Float[Array, "... n"]
    log_det: Float[Array, "... n"]
