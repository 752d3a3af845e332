"""The barrier prior: a log-barrier that pushes every position away from the degeneracy boundary det J_i = 0.

    b_i = -log|det J_i|

As a prior it is the improper prod_i |det J_i|^lambda. It is infinite at the boundary from both sides and not bounded
below: on either side of the wall it rewards growing |det J_i| without limit, so an objective that uses it alone
needs a weight prior (docs/theory.md section 5).

One-sided, our own: with x = log(det J_i / threshold),

    phi_i = -x exp(1 / x)   for 0 < det J_i < threshold,     0   from the threshold on,     +inf   for det J_i <= 0

It has derivatives of every order, behaves like -log det J_i at the wall, and stops paying once the margin is wide
enough. Where an optimiser has to come back from det J_i <= 0, `one_sided_penalty` puts log(1 + |det J_i| / threshold)
in place of the infinity: its slope in det J_i is finite and points to the wall. Source: ours, theory section 5.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from prob_transformer._validation import require_positive
from prob_transformer.attention import Attention
from prob_transformer.change_of_variables import residual_and_log_det


def barrier(attention: Attention, embeddings: Float[Array, "... n d"]) -> Float[Array, "... n"]:
    """b_i = -log|det J_i| in nats at every position; +inf on the boundary itself.

    Raises ValueError as `residual_and_log_det`. Source: theory section 4, second-hand for the per-position form.
    """
    return -residual_and_log_det(attention, embeddings).log_det


def one_sided_barrier(
    attention: Attention, embeddings: Float[Array, "... n d"], threshold: Float[Array, ""] | float = 0.5
) -> Float[Array, "... n"]:
    """phi_i of the module docstring at every position: 0 where det J_i >= threshold, +inf where det J_i <= 0.

    Raises ValueError unless threshold > 0, and as `residual_and_log_det`. Source: ours, theory section 5.
    """
    _, sign, log_det = residual_and_log_det(attention, embeddings)
    return jnp.where(sign > 0, one_sided_penalty(sign, log_det, threshold), jnp.inf)


def one_sided_penalty(
    sign: Float[Array, "*S"], log_det: Float[Array, "*S"], threshold: Float[Array, ""] | float = 0.5
) -> Float[Array, "*S"]:
    """phi_i from sign and log|det J_i|, with log(1 + |det J_i| / threshold) where the sign is not positive.

    For training, where a step may have crossed the wall: watch the signs beside it. Raises ValueError unless
    threshold > 0. Source: ours, theory section 5.
    """
    require_positive("threshold", threshold)
    x = log_det - jnp.log(jnp.asarray(threshold, log_det.dtype))
    # From -1e-3 on exp(1 / x) is zero in float64 already, and the 1 / x^2 of its slope would overflow.
    inside = jnp.minimum(x, -1e-3)
    positive = -inside * jnp.exp(1 / inside)
    return jnp.where(sign > 0, positive, jnp.logaddexp(x, 0.0))
