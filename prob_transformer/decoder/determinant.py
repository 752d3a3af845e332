"""sign(det J_i) and log|det J_i| of one head through a determinant of the head's size, in the names of jacobian.py.

det(I - A B) = det(I - B A), and the factor c of identity values comes out as d log c, so nothing of size d appears and
nothing overflows at real widths:

    identity, strict     det(I_p - Cov(x, g)),                 x = W_Q u, values seen through the queries
    identity, inclusive  d log c + log|det(I_{p+1} - B A)|,    B A = [ C        alpha x_off    ]
                                                                     [ w^T C_u  alpha w^T e_i  ]
    own                  det(I_v - G_i W_O)

with w^T u_s = g_off . x_s + h_i . W_K u_s, so that w^T C_u and w^T e_i need no vector of width d either.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from prob_transformer.attention import Attention
from prob_transformer.decoder.jacobian import inner_map
from prob_transformer.decoder.view import Head, Reading, View, pulled_to_query, view_from
from prob_transformer.kernels.sweep import LogDet


def _bordered(layer: Attention, head: Head, view: View, positions: Int[Array, " b"]) -> Float[Array, "b p+1 p+1"]:
    """B A of the module docstring for identity values with the position itself included."""
    through_keys = view.own_slope @ head.unbiased_keys.T
    mean = (view.weights * through_keys).sum(-1, keepdims=True)
    share = view.weights * (through_keys - mean)
    if view.cap_slopes is not None:
        share = share * view.cap_slopes
    past = pulled_to_query(layer, head, positions, share @ head.keys)
    row = jnp.einsum("bf,bfp->bp", view.slope_offset, view.covariance) + past
    own = jnp.take_along_axis(through_keys, positions[:, None], 1) - mean
    corner = (view.slope_offset * view.offset).sum(-1, keepdims=True) + own
    column = jnp.concatenate([view.offset, corner], 1) * view.own_share[:, None]
    rows = jnp.concatenate([view.covariance, row[:, None]], 1)
    return jnp.concatenate([rows, column[:, :, None]], 2)


def block_log_det(
    layer: Attention, head: Head, inputs: Float[Array, "n d"], positions: Int[Array, " b"], reading: Reading
) -> LogDet:
    """Sign and log|det J_i| in nats at the given positions; sign 0 and -inf where J_i is singular."""
    log_scale = None
    if head.value is not None and head.output is not None:
        view = view_from(layer, head, inputs @ head.value.T, positions, reading)
        maps = (head.query @ head.output, head.value @ head.output, head.key @ head.output)
        product = inner_map(view, *maps, reading)
    else:
        view = view_from(layer, head, inputs @ head.query.T, positions, reading)
        product = view.covariance
        if reading.inclusive:
            product = _bordered(layer, head, view, positions)
            log_scale = layer.width * view.log_past_share
    sign, log_det = jnp.linalg.slogdet(jnp.eye(product.shape[1], dtype=product.dtype) - product)
    if log_scale is None:
        return LogDet(sign, log_det)
    # Without a past c = 0: the position attends to itself alone and J_i is the zero matrix.
    return LogDet(jnp.where(jnp.isfinite(log_scale), sign, 0), log_scale + log_det)
