"""Noise to embeddings and back as a NumPyro transform, with an error that names what went wrong.

The root finder is `prob_transformer.root_finder`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform

from prob_transformer._validation import require_count
from prob_transformer.attention import Attention, require_attention, require_joint
from prob_transformer.change_of_variables import residual_and_log_det
from prob_transformer.root_finder import (
    CONTINUATION_STEPS,
    MEANING,
    ImplicitSolveError,
    Solution,
    SolveStatus,
    solve_sequences,
)


def raise_unless_converged(solution: Solution) -> Float[Array, "... n d"]:
    """The embeddings, or an `ImplicitSolveError`; inside jit, an error raised when the compiled code runs."""
    embeddings, status = solution
    if not isinstance(status, Tracer):
        codes = np.asarray(status)
        if codes.any():
            position = int(np.argwhere(codes > 0)[0][-1])
            raise ImplicitSolveError(SolveStatus(int(codes[codes > 0][0])), position)
        return embeddings
    for failure in MEANING:
        embeddings = eqx.error_if(embeddings, status == failure, _inside_jit(failure))
    return embeddings


def _inside_jit(failure: SolveStatus) -> str:
    return f"{failure.name.lower()}: {MEANING[failure]}."


@contextlib.contextmanager
def named_solve_errors() -> Iterator[None]:
    """A context that raises what went wrong inside jit as the `ImplicitSolveError` that it is; it names the status.

    JAX reports an error of compiled code as a traceback of its callback, whose last lines say what it was. What runs
    inside has to end inside, by jax.block_until_ready for one.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        found = [failure for failure in MEANING if _inside_jit(failure) in text]
        if isinstance(error, ImplicitSolveError) or not found:
            raise
        raise ImplicitSolveError(found[0]) from error


class CausalAttentionTransform(Transform):
    """Noise (..., n, d) -> embeddings (..., n, d) with u_i - mu_i(u_i; u_<i) = noise_i, a coupled NumPyro transform.

    Calling it solves the implicit equation (`solve` gives a status a position instead of an error) and raises
    `ImplicitSolveError` where that did not converge or met det J <= 0. `inv` is the explicit residual.
    `log_abs_det_jacobian` is -sum_i log|det J_i| in nats. Gradients of the call follow the implicit function theorem.
    """

    domain = constraints.real_matrix
    codomain = constraints.real_matrix

    def __init__(self, attention: Attention, continuation_steps: int = CONTINUATION_STEPS):
        require_attention(attention)
        require_count("continuation_steps", continuation_steps, 1, "1 solves directly from the noise")
        self.attention = attention
        self.continuation_steps = continuation_steps

    def solve(self, noise: Float[Array, "... n d"]) -> Solution:
        """Embeddings and a `SolveStatus` code for every position, never an error for a root that was not found."""
        noise = require_joint("noise", noise, self.attention)
        return solve_sequences(self.attention, noise, self.continuation_steps)

    def __call__(self, x: Float[Array, "... n d"]) -> Float[Array, "... n d"]:
        return raise_unless_converged(self.solve(x))

    def _inverse(self, y: Float[Array, "... n d"]) -> Float[Array, "... n d"]:
        return residual_and_log_det(self.attention, y).residual

    def log_abs_det_jacobian(
        self, x: Float[Array, "... n d"], y: Float[Array, "... n d"], intermediates: Any = None
    ) -> Float[Array, "..."]:
        return -residual_and_log_det(self.attention, y).log_det.sum(-1)

    def tree_flatten(self) -> tuple[tuple[Attention], tuple[tuple[str], dict[str, int]]]:
        return (self.attention,), (("attention",), {"continuation_steps": self.continuation_steps})

    def eq(self, other: object, static: bool = False) -> bool | Bool[Array, ""]:
        if type(other) is not type(self) or self.continuation_steps != other.continuation_steps:
            return False
        return eqx.tree_equal(self.attention, other.attention)
