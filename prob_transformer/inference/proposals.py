"""How a particle is extended by one position: two proposals q, each with the log of density over q.

    process   the process itself: draw eps_i, solve e_i(u_i) = eps_i; density / q = 1
    direct    u_i ~ N(c, diag s^2), c the plain mean of the values and s their spread plus the noise; no root to find,
              density / q = N(e_i; 0, scale^2 I) |det J_i| / N(u_i; c, diag s^2)

Where det J > 0 everywhere both target one law. Elsewhere (docs/theory.md section 3) the first draws from the law of its
root finder, which is not the |det J| density; the second targets that density, whose mass exceeds 1.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm
from jaxtyping import Array, Float, Int

from prob_transformer.attention import Attention, Past, attention_weights, weighted_mean
from prob_transformer.change_of_variables import residual_and_log_det_at
from prob_transformer.root_finder import SolveStatus, solve_position

ProposalName = Literal["process", "direct"]
# Anything above 1 bounds density / q given the past, because mu_i is bounded; more only wastes particles.
_INFLATION = 1.25


# An embedding, log density / q of it in nats, and a `SolveStatus` code.
Proposal = tuple[Float[Array, " d"], Float[Array, ""], Int[Array, ""]]


def from_process(
    attention: Attention, past: Past, scale: Float[Array, ""], standard_normal: Float[Array, " d"]
) -> Proposal:
    """The root of e(u) = scale * standard_normal; the noise itself where no root was found."""
    noise = scale * standard_normal
    root, status = solve_position(attention, past, noise)
    # A lost root may be anything, NaN included, and would spoil the cache.
    embedding = jnp.where(status == SolveStatus.NOT_CONVERGED, noise, root)
    return embedding, jnp.zeros_like(scale), status


def from_values(
    attention: Attention, past: Past, scale: Float[Array, ""], standard_normal: Float[Array, " d"]
) -> Proposal:
    """An embedding around the values attended to, with its exact density; PAST_BOUNDARY where its det J <= 0."""
    # At u = 0 the weights are uniform: the centre is the plain mean, the spread how far mu_i may well be from it.
    uniform = attention_weights(attention, past, jnp.zeros_like(standard_normal))
    means = jax.vmap(weighted_mean)(uniform, past.values)
    variances = jax.vmap(weighted_mean)(uniform, jnp.square(past.values - means[:, None]))
    centre, spread = means.sum(0), jnp.sqrt(variances).sum(0)
    width = jnp.sqrt(jnp.square(_INFLATION * scale) + jnp.square(spread))
    embedding = centre + width * standard_normal
    residual, sign, log_det = residual_and_log_det_at(attention, past, embedding)
    log_density = norm.logpdf(residual, 0.0, scale).sum() + log_det
    status = jnp.where(sign > 0, SolveStatus.CONVERGED, SolveStatus.PAST_BOUNDARY).astype(jnp.int32)
    return embedding, log_density - norm.logpdf(embedding, centre, width).sum(), status


PROPOSALS: dict[str, Callable[..., Proposal]] = {"process": from_process, "direct": from_values}
