"""The barrier prior: a log-barrier that pushes every position away from the degeneracy boundary det J_i = 0.

    b_i = -log|det J_i|

As a prior it is the improper prod_i |det J_i|^lambda. It is infinite at the boundary from both sides and not bounded
below: on either side of the wall it rewards growing |det J_i| without limit, so an objective that uses it alone
needs a weight prior (docs/theory.md section 5).

One-sided, our own: with t the threshold and x = log(det J_i / t),

    phi_i = -x exp(1 / x)   for 0 < det J_i < t,     0   from t on,     +inf   for det J_i <= 0

It has derivatives of every order, behaves like -log det J_i at the wall, and is zero once the margin is wide enough.
An optimiser that has crossed the wall needs a finite way back. For det J_i <= 0 `one_sided_penalty` is

    phi_i = K (1 + log(1 + |det J_i| / t)),          K = log(t / s),     s the smallest positive number of the dtype

Before the wall phi_i < -x, and det J_i >= s in this dtype, so phi_i < K there: crossing is never rewarded. Past the
wall the slope in det J_i is -K / (t + |det J_i|), finite and leading back. Source: ours, theory section 5.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from prob_transformer._dtypes import in_float32_at_least
from prob_transformer._implementation import Implementation
from prob_transformer._validation import require_positive
from prob_transformer.attention import Attention
from prob_transformer.change_of_variables import residual_and_log_det


def barrier(
    attention: Attention, embeddings: Float[Array, "... n d"], *, implementation: Implementation | None = None
) -> Float[Array, "... n"]:
    """b_i = -log|det J_i| in nats at every position; +inf on the boundary itself.

    Raises ValueError as `residual_and_log_det`. Source: theory section 4, second-hand for the per-position form.
    """
    return -residual_and_log_det(attention, embeddings, implementation=implementation).log_det


@in_float32_at_least
def one_sided_barrier(
    attention: Attention,
    embeddings: Float[Array, "... n d"],
    threshold: Float[Array, ""] | float = 0.5,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "... n"]:
    """The one-sided barrier phi_i in nats (module docstring): 0 where det J_i >= threshold, +inf where det J_i <= 0.

    Raises ValueError unless threshold > 0, and as `residual_and_log_det`. Source: ours, theory section 5.
    """
    _, sign, log_det = residual_and_log_det(attention, embeddings, implementation=implementation)
    return jnp.where(sign > 0, one_sided_penalty(sign, log_det, threshold), jnp.inf)


@in_float32_at_least
def one_sided_penalty(
    sign: Float[Array, "*S"], log_det: Float[Array, "*S"], threshold: Float[Array, ""] | float = 0.5
) -> Float[Array, "*S"]:
    """The penalty phi_i (module docstring) from sign and log|det J_i|: finite everywhere, at least K where sign <= 0.

    A determinant smaller than s counts as s. For training, where a step may have crossed the wall: watch the signs
    beside it. Raises ValueError unless threshold > 0. Source: ours, theory section 5.
    """
    require_positive("threshold", threshold)
    log_threshold = jnp.log(jnp.asarray(threshold, log_det.dtype))
    largest = log_threshold - math.log(float(jnp.finfo(log_det.dtype).smallest_subnormal))
    x = log_det - log_threshold
    # From -1e-3 on exp(1 / x) is zero in float64 already, and the 1 / x^2 of its slope would overflow.
    inside = jnp.clip(x, -largest, -1e-3)
    before = -inside * jnp.exp(1 / inside)
    return jnp.where(sign > 0, before, largest * (1 + jnp.logaddexp(x, 0.0)))
