"""Derivative of one head's map e_i = u_i - mu_i in u_i, as a low-rank change of the identity.

In the names of view.py, W_Q and W_K those of the head. Strict past, any values v = V u:

    J_i = I - V C_i W_Q,                                        C_i = Cov_beta(u, g)   (d x p)

With position i among its own keys and values, u_i also moves v_i and k_i. Its mean is mu_i = alpha v_i + c v_mean, and
collecting all terms in moments of the strict past,

    own       J_i = I - W_O G_i
              G_i = c (C_i + alpha x_off g_off^T) W_Q + alpha W_V + c alpha x_off h_i^T W_K
    identity  J_i = c (I - C_i W_Q - alpha e_i w_i^T),    w_i = W_Q^T g_off + W_K^T h_i

where x = W_V u, and x_off, g_off are the offsets of position i from the past's means; e_i = u_i - u_mean is the strict
residual. So the self-inclusive map with identity values is the strict one with a rank-one term, times c: J_i -> 0 as a
position comes to attend only to itself, as the first one always does.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from prob_transformer.attention import Attention
from prob_transformer.decoder.view import Head, Reading, View, view_from


class Factored(NamedTuple):
    """J_i = scale_i (I - left_i right_i) for a block of b positions."""

    scale: Float[Array, " b"]
    left: Float[Array, "b d r"]
    right: Float[Array, "b r d"]

    def dense(self) -> Float[Array, "b d d"]:
        """J_i as a full matrix."""
        identity = jnp.eye(self.left.shape[1], dtype=self.left.dtype)
        return self.scale[:, None, None] * (identity - self.left @ self.right)


def inner_map(
    view: View,
    query: Float[Array, "p a"],
    value: Float[Array, "v a"],
    key: Float[Array, "p a"],
    reading: Reading,
) -> Float[Array, "b v a"]:
    """G_i of the module docstring, or G_i T when the three maps W_Q, W_V, W_K are given as W_Q T, W_V T, W_K T."""
    if not reading.inclusive:
        return view.covariance @ query
    alpha, c = (share[:, None, None] for share in (view.own_share, view.past_share))
    offset = c * alpha * view.offset[:, :, None]
    moments = c * view.covariance + offset * view.slope_offset[:, None]
    return moments @ query + alpha * value + offset * (view.own_slope @ key)[:, None]


def factored_jacobian(
    layer: Attention, head: Head, inputs: Float[Array, "n d"], positions: Int[Array, " b"], reading: Reading
) -> Factored:
    """J_i of one head at the given positions."""
    if head.value is not None and head.output is not None:
        view = view_from(layer, head, inputs @ head.value.T, positions, reading)
        right = inner_map(view, head.query, head.value, head.key, reading)
        left = jnp.broadcast_to(head.output, (positions.shape[0], *head.output.shape))
        return Factored(jnp.ones_like(view.own_share), left, right)
    view = view_from(layer, head, inputs, positions, reading)
    left = view.covariance
    right = jnp.broadcast_to(head.query, (positions.shape[0], *head.query.shape))
    if reading.inclusive:
        extra = view.own_share[:, None] * view.offset
        slope = view.slope_offset @ head.query + view.own_slope @ head.key
        left = jnp.concatenate([left, extra[:, :, None]], 2)
        right = jnp.concatenate([right, slope[:, None]], 1)
    return Factored(view.past_share, left, right)


def smallest_singular_value(factored: Factored) -> Float[Array, " b"]:
    """sigma_min(J_i), found in the span of left and right^T where its 2r dimensions are fewer than d.

    Outside the span J_i is its scale c times identity, and inside it sigma_min is at most c: if the span has 2r
    dimensions, J^T J / c^2 - I is congruent there to [[left^T left, -I], [-I, 0]], which has r negative eigenvalues; if
    it has fewer, QR completes the basis with directions from outside.
    """
    scale, left, right = factored
    rank, width = right.shape[1:]
    if 2 * rank >= width:
        return jnp.linalg.svd(factored.dense(), compute_uv=False)[:, -1]
    basis, _ = jnp.linalg.qr(jnp.concatenate([left, jnp.swapaxes(right, 1, 2)], 2))
    core = jnp.eye(2 * rank, dtype=left.dtype) - (jnp.swapaxes(basis, 1, 2) @ left) @ (right @ basis)
    return scale * jnp.linalg.svd(core, compute_uv=False)[:, -1]
