"""Noise to embeddings: solving e_i(u_i; u_<i) = eps_i position by position, and saying when that failed.

The embedding -> noise direction is explicit. The other one is an implicit equation in u_i, solved here by continuation
from the noise: starting at u = eps_i, whose own residual is eps_i - mu_i(eps_i), the target moves in a straight line
from that residual to eps_i and the root is tracked along it. Where det J_i > 0 everywhere, e_i is a global
diffeomorphism (docs/theory.md section 3), so this path exists and ends at the only root. Elsewhere it may meet
det J_i <= 0, which the status reports, or end at one of several roots with det J_i > 0, which it cannot see.
"""

import contextlib
import enum
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform

from prob_transformer._validation import is_concrete, require_count
from prob_transformer.attention import Attention, Past, require_attention, require_joint
from prob_transformer.change_of_variables import ResidualAndLogDet, residual_and_log_det, residual_and_log_det_at

CONTINUATION_STEPS = 16
# Trust-region steps allowed at each point of the path.
_MAX_STEPS = 256

_Problem = tuple[Attention, Past, Float[Array, " d"]]
Tree = TypeVar("Tree")


class SolveStatus(enum.IntEnum):
    """How solving for one position ended; the larger the worse, so that a maximum summarises."""

    CONVERGED = 0
    PAST_BOUNDARY = 1
    NOT_CONVERGED = 2


_MEANING = {
    SolveStatus.PAST_BOUNDARY: (
        "det J <= 0 was met at the root or on the way to it, so the equation may have several roots and the law of the "
        "one found is not the density; scale query or key down (docs/theory.md section 3 has sufficient "
        "conditions), or use `solve` to receive this root with its status"
    ),
    SolveStatus.NOT_CONVERGED: (
        "the path from the noise was lost or ended outside tolerance; raise `continuation_steps` or use float64, and "
        "if that does not help the path meets det J = 0: scale query or key down"
    ),
}


class ImplicitSolveError(RuntimeError):
    """The implicit equation u - mu(u) = noise was not solved as asked; `status` names how, and `position` where, which
    is None for an equation that was solved inside jit."""

    def __init__(self, status: SolveStatus, position: int | None = None):
        self.status, self.position = status, position
        where = "" if position is None else f" at position {position}"
        super().__init__(f"{status.name.lower()}{where}: {_MEANING[status]}.")


class Solution(NamedTuple):
    """Embeddings (..., n, d) and, for each position, a `SolveStatus` code (..., n)."""

    embeddings: Float[Array, "... n d"]
    status: Int[Array, "... n"]


def residual_tolerance(dtype: Any) -> float:
    """Largest |e(u) - noise| accepted as a root, relative to 1 + max|noise|."""
    return 1e-9 if jnp.dtype(dtype) == jnp.float64 else 1e-4


def status_after(
    mismatch: Float[Array, "... d"],
    sign: Float[Array, "..."],
    allowed: Float[Array, "..."] | float,
    status_so_far: Int[Array, "..."],
) -> Int[Array, "..."]:
    """The worse of `status_so_far` and what a point of the path is: a root, if its mismatch is allowed, or not."""
    # Written so that a NaN counts as not converged.
    reached = jnp.abs(mismatch).max(-1) <= allowed
    crossed = jnp.where(sign > 0, SolveStatus.CONVERGED, SolveStatus.PAST_BOUNDARY)
    return jnp.maximum(status_so_far, jnp.where(reached, crossed, SolveStatus.NOT_CONVERGED).astype(jnp.int32))


def _in_default_precision(tree: Tree) -> Tree:
    floating, rest = eqx.partition(tree, eqx.is_inexact_array)
    return eqx.combine(jax.tree.map(lambda leaf: leaf.astype(jnp.result_type(float)), floating), rest)


def solve_position(
    attention: Attention, past: Past, noise: Float[Array, " d"], continuation_steps: int = CONTINUATION_STEPS
) -> tuple[Float[Array, " d"], Int[Array, ""]]:
    """The root u_i of e_i(u_i; past) = noise reached by continuation from the noise, and its `SolveStatus`."""
    dtype = noise.dtype
    # In JAX's default precision whatever the input's, because optimistix starts its trust region there.
    attention, past, noise = _in_default_precision((attention, past, noise))
    tolerance = 1e-12 if noise.dtype == jnp.float64 else 1e-6
    solver: optx.Dogleg = optx.Dogleg(rtol=tolerance, atol=tolerance)
    scale = 1.0 + jnp.abs(noise).max()

    def mismatch(u: Float[Array, " d"], problem: _Problem) -> Float[Array, " d"]:
        attention, past, target = problem
        return residual_and_log_det_at(attention, past, u).residual - target

    def root_near(guess: Float[Array, " d"], problem: _Problem) -> Float[Array, " d"]:
        # The result code is not used: a trust region that stops early at a root to within rounding is not a failure,
        # and one that stops elsewhere is caught by the residual itself.
        return optx.root_find(mismatch, solver, guess, args=problem, max_steps=_MAX_STEPS, throw=False).value

    frozen_attention, frozen_past, frozen_noise = jax.lax.stop_gradient((attention, past, noise))
    start = residual_and_log_det_at(frozen_attention, frozen_past, frozen_noise)

    def judge(here: ResidualAndLogDet, target: Float[Array, " d"], status_so_far: Int[Array, ""]) -> Int[Array, ""]:
        return status_after(here.residual - target, here.sign, residual_tolerance(noise.dtype) * scale, status_so_far)

    def follow(
        carry: tuple[Array, Array, Array], fraction: Float[Array, ""]
    ) -> tuple[tuple[Array, Array, Array], None]:
        u, residual, status = carry
        target = start.residual + fraction * (frozen_noise - start.residual)
        # A lost path is not followed further: its target becomes where it already is, and the solve ends at once.
        target = jnp.where(status == SolveStatus.CONVERGED, target, residual)
        u = root_near(u, (frozen_attention, frozen_past, target))
        here = residual_and_log_det_at(frozen_attention, frozen_past, u)
        return (u, here.residual, judge(here, target, status)), None

    at_start = (frozen_noise, start.residual, judge(start, start.residual, jnp.int32(0)))
    fractions = jnp.arange(1, continuation_steps, dtype=noise.dtype) / continuation_steps
    (guess, _, status), _ = jax.lax.scan(follow, at_start, fractions)
    # Only the last solve is differentiated (implicit function theorem); the path before it just chose the root.
    u = root_near(jax.lax.stop_gradient(guess), (attention, past, noise))
    return u.astype(dtype), judge(residual_and_log_det_at(attention, past, u), noise, status)


@eqx.filter_jit
def _solve(attention: Attention, noise: Float[Array, "... n d"], continuation_steps: int) -> Solution:
    length, width = noise.shape[-2:]

    def one_sequence(sequence: Float[Array, "n d"]) -> Solution:
        def step(past: Past, noise_here: Float[Array, " d"]) -> tuple[Past, tuple[Array, Array]]:
            u, status = solve_position(attention, past, noise_here, continuation_steps)
            return past.write(attention, u), (u, status)

        empty = Past.empty(attention, length, sequence.dtype)
        _, (embeddings, status) = jax.lax.scan(step, empty, sequence)
        return Solution(embeddings, status)

    flat = jax.vmap(one_sequence)(noise.reshape(-1, length, width))
    return Solution(flat.embeddings.reshape(noise.shape), flat.status.reshape(noise.shape[:-1]))


def raise_unless_converged(solution: Solution) -> Float[Array, "... n d"]:
    """The embeddings, or an `ImplicitSolveError`; inside jit, an error raised when the compiled code runs."""
    embeddings, status = solution
    if is_concrete(status):
        codes = np.asarray(status)
        if codes.any():
            position = int(np.argwhere(codes > 0)[0][-1])
            raise ImplicitSolveError(SolveStatus(int(codes[codes > 0][0])), position)
        return embeddings
    for failure in _MEANING:
        embeddings = eqx.error_if(embeddings, status == failure, _inside_jit(failure))
    return embeddings


def _inside_jit(failure: SolveStatus) -> str:
    return f"{failure.name.lower()}: {_MEANING[failure]}."


@contextlib.contextmanager
def named_solve_errors() -> Iterator[None]:
    """Raise what went wrong inside jit as the `ImplicitSolveError` that it is, whose first line names the status.

    JAX reports an error of compiled code as a traceback of its callback, whose last lines say what it was. What runs
    inside has to end inside, by jax.block_until_ready for one.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        found = [failure for failure in _MEANING if _inside_jit(failure) in text]
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
        return _solve(self.attention, noise, self.continuation_steps)

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
