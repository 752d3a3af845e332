"""A layer whose positions may attend to themselves: a diagnostic, for which no density is claimed.

The process and its density have a strict past (change_of_variables.py). Trained decoders let a position attend to
itself. That changes the derivative by more than another term of a sum, because u_i then moves v_i and k_i too. Here
all is written with the moments of the strict past and what the position itself adds, for blocks of positions of one
head; the strict past alone is the case without. margins.py ranks what comes out.

Weights. The strict past s < i has softmax weights beta_is. With the position itself they are

    alpha_ii = own share,   alpha_is = c beta_is,   c = 1 - alpha_ii = sigmoid(log sum_s<i exp(logit_is) - logit_ii)

so c is all that is needed beyond the strict past, and nothing cancels where it is small. Both sides of the covariance
are centred at their own weighted means, position by position: under an attention sink, where one far-off token has
nearly all the weight, E[xy] - E[x]E[y] would have no digits left in float32. Weights, c and means come in float64; the
sums of the covariance, nearly all of the work, are made in `narrow`.

Slopes and moments. With the slopes g_s = d logit_is / d q_i of the strict past in the plain query, those of the
position itself in its own plain query and key, g_i and h_i, and the moments of the strict past,

    C_i = Cov_beta(x, g),   offset x_i - x_mean,   slope offset g_i - g_mean,   alpha = alpha_ii,   c = 1 - alpha

are all that determinants and Jacobians need; x are features, any linear map of the inputs. Rotary positions, norms and
caps are in g and h: with seen queries and keys q^, k^ and the cap's slope gamma,

    g_s = gamma_is (d q^_i / d q_i)^T k^_s,          h_i = gamma_ii (d k^_i / d k_i)^T q^_i

Jacobian. With W_Q and W_K of the head, strict past and any values v = V u,

    J_i = I - V C_i W_Q,                                        C_i = Cov_beta(u, g)   (d x p)

With position i among its own keys and values, u_i also moves v_i and k_i. Its mean is mu_i = alpha v_i + c v_mean, and
collecting all terms in moments of the strict past,

    own       J_i = I - W_O G_i
              G_i = c (C_i + alpha x_off g_off^T) W_Q + alpha W_V + c alpha x_off h_i^T W_K
    identity  J_i = c (I - C_i W_Q - alpha e_i w_i^T),    w_i = W_Q^T g_off + W_K^T h_i

where x = W_V u, and x_off, g_off are the offsets of position i from the past's means; e_i = u_i - u_mean is the strict
residual. So the self-inclusive map with identity values is the strict one with a rank-one term, times c: J_i -> 0 as a
position comes to attend only to itself, as the first one always does.

Determinant. det(I - A B) = det(I - B A), and the factor c of identity values comes out as d log c, so nothing of size d
appears and nothing overflows at real widths:

    identity, strict     det(I_p - Cov(x, g)),                 x = W_Q u, values seen through the queries
    identity, inclusive  d log c + log|det(I_{p+1} - B A)|,    B A = [ C        alpha x_off    ]
                                                                     [ w^T C_u  alpha w^T e_i  ]
    own                  det(I_v - G_i W_O)

with w^T u_s = g_off . x_s + h_i . W_K u_s, so that w^T C_u and w^T e_i need no vector of width d either.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from prob_transformer.attention import Attention
from prob_transformer.kernels.moments import LogDet
from prob_transformer.softmax import capped

# Keys a step of the sweep over the past; later ones are not touched for earlier queries.
CHUNK = 128


def past_moments(
    weights: Float[Array, "b n"],
    slopes: Float[Array, "b n"] | None,
    positions: Int[Array, " b"],
    features: Float[Array, "n f"],
    keys: Float[Array, "n p"],
    narrow: DTypeLike,
) -> tuple[Float[Array, "b f"], Float[Array, "b p"], Float[Array, "b f p"]]:
    """Of b positions: the means of features and keys under the weights, and their covariance.

    With slopes gamma_is the keys are gamma_is k_s instead. Features are then centred at their mean under the weights,
    and keys at theirs under weights times slopes, of which sum_s alpha_s gamma_s (x_s - x_mean) k_s^T keeps a term.
    """
    length = keys.shape[0]
    sloped = weights if slopes is None else weights * slopes
    feature_mean, key_mean = weights @ features, sloped @ keys
    centre = key_mean
    if slopes is not None:
        total = sloped.sum(-1, keepdims=True)
        centre = key_mean / jnp.where(total > 0, total, 1)
    chunk = min(CHUNK, length)
    extra = -length % chunk
    padded_weights = jnp.pad(sloped.astype(narrow), [(0, 0), (0, extra)])
    # Features stand across, as the left side of a plain product.
    across = jnp.pad(features.T.astype(narrow), [(0, 0), (0, extra)])
    down = jnp.pad(keys.astype(narrow), [(0, extra), (0, 0)])
    left_mean, right_mean = feature_mean.astype(narrow)[:, :, None], centre.astype(narrow)[:, None]

    def add_chunk(step: Int[Array, ""], covariance: Float[Array, "b f p"]) -> Float[Array, "b f p"]:
        start = step * chunk
        share = lax.dynamic_slice_in_dim(padded_weights, start, chunk, 1)
        left = lax.dynamic_slice_in_dim(across, start, chunk, 1) - left_mean
        right = lax.dynamic_slice_in_dim(down, start, chunk, 0) - right_mean
        return covariance + (left * share[:, None]) @ right

    shape = (positions.shape[0], features.shape[1], keys.shape[1])
    covariance = lax.fori_loop(0, positions.max() // chunk + 1, add_chunk, jnp.zeros(shape, narrow))
    covariance = covariance.astype(keys.dtype)
    if slopes is not None:
        left_over = sloped @ features - sloped.sum(-1, keepdims=True) * feature_mean
        covariance = covariance + left_over[:, :, None] * centre[:, None]
    return feature_mean, key_mean, covariance


class Head(NamedTuple):
    """One head of a layer on inputs (n, d): its own maps, no `value` and `output` for identity, and its projections.

    `plain_queries` and `queries` are before and after norm and rotation, the latter with the scale; `keys` are after
    them, `unbiased_keys` W_K u. `own_slopes` is d (q^_i . k^_i) / d k_i at every position, without the cap.
    """

    query: Float[Array, "p d"]
    key: Float[Array, "p d"]
    value: Float[Array, "v d"] | None
    output: Float[Array, "d v"] | None
    plain_queries: Float[Array, "n p"]
    queries: Float[Array, "n p"]
    unbiased_keys: Float[Array, "n p"]
    keys: Float[Array, "n p"]
    own_slopes: Float[Array, "n p"]


class Reading(NamedTuple):
    """How a layer is read: whether a position attends to itself too, and the dtype that the large sums are made in."""

    inclusive: bool
    narrow: str


class Shares(NamedTuple):
    """See the module docstring: `own_share` is alpha, `past_share` c, `weights` beta, `cap_slopes` gamma."""

    own_share: Float[Array, " b"]
    past_share: Float[Array, " b"]
    log_past_share: Float[Array, " b"]
    weights: Float[Array, "b n"]
    cap_slopes: Float[Array, "b n"] | None


class View(NamedTuple):
    """See the module docstring: `own_slope` is h_i."""

    shares: Shares
    covariance: Float[Array, "b f p"]
    offset: Float[Array, "b f"]
    slope_offset: Float[Array, "b p"]
    own_slope: Float[Array, "b p"]


def heads_of(layer: Attention, inputs: Float[Array, "n d"], own_values: bool) -> Head:
    """All heads, stacked along the first axis, each with the keys and values of its group."""
    group, positions = layer.group_of_head, jnp.arange(inputs.shape[0])
    value = output = None
    if own_values:
        if layer.value is None:
            raise ValueError('values: got "own", but the layer has no value maps; give it value, or pass "identity".')
        value = layer.value[group]
        output = layer.output
        if output is None:
            output = jnp.broadcast_to(jnp.eye(layer.width, dtype=value.dtype), (layer.heads, *value.shape[1:]))
    plain_queries, plain_keys = layer.plain_queries(inputs), layer.plain_keys(inputs)[group]
    queries = layer.seen_queries(plain_queries, positions)
    keys, pull_back = jax.vjp(partial(layer.seen_keys, positions=positions), plain_keys)
    unbiased = plain_keys if layer.key_bias is None else plain_keys - layer.key_bias[group][:, None]
    return Head(
        layer.query, layer.key[group], value, output, plain_queries, queries, unbiased, keys, pull_back(queries)[0]
    )


def pulled_to_query(
    layer: Attention, head: Head, positions: Int[Array, " b"], x: Float[Array, "b ... p"]
) -> Float[Array, "b ... p"]:
    """(d q^_i / d q_i)^T x for every row of x at its position i."""
    if layer.is_bilinear:
        return layer.scale * x

    def rows(plain: Float[Array, " p"], position: Int[Array, ""], x: Float[Array, "... p"]) -> Float[Array, "... p"]:
        _, pull_back = jax.vjp(lambda plain: layer.seen_queries(plain[None], position)[0], plain)
        return jax.vmap(pull_back)(x.reshape(-1, x.shape[-1]))[0].reshape(x.shape)

    return jax.vmap(rows)(head.plain_queries[positions], positions, x)


def shares_of(layer: Attention, head: Head, positions: Int[Array, " b"], reading: Reading) -> Shares:
    """How the positions share out their attention; strict means own share 0 and past share 1."""
    logits = head.queries[positions] @ head.keys.T
    slopes = None
    if layer.cap is not None:
        slopes = 1 - jnp.square(jnp.tanh(logits / layer.cap))
        logits = capped(logits, layer.cap)
    visible = layer.sees(positions[:, None], jnp.arange(logits.shape[1])[None])
    # beta, all zero where nothing is visible, and log(c / alpha_ii), -inf there.
    total = jax.nn.logsumexp(jnp.where(visible, logits, -jnp.inf), axis=-1)
    reference = jnp.where(visible.any(-1), total, 0)[:, None]
    weights = jnp.exp(jnp.where(visible, logits - reference, -jnp.inf))
    if not reading.inclusive:
        nothing = jnp.zeros_like(total)
        return Shares(nothing, jnp.ones_like(total), nothing, weights, slopes)
    log_odds = total - jnp.take_along_axis(logits, positions[:, None], axis=1)[:, 0]
    shares = jax.nn.sigmoid(-log_odds), jax.nn.sigmoid(log_odds), jax.nn.log_sigmoid(log_odds)
    return Shares(*shares, weights, slopes)


def view_from(
    layer: Attention, head: Head, features: Float[Array, "n f"], positions: Int[Array, " b"], reading: Reading
) -> View:
    """The head and its features as the positions see them."""
    shares = shares_of(layer, head, positions, reading)
    slopes = shares.cap_slopes
    own_cap = 1.0 if slopes is None else jnp.take_along_axis(slopes, positions[:, None], axis=1)
    feature_mean, key_mean, covariance = past_moments(
        shares.weights, slopes, positions, features, head.keys, reading.narrow
    )
    return View(
        shares,
        pulled_to_query(layer, head, positions, covariance),
        features[positions] - feature_mean,
        pulled_to_query(layer, head, positions, own_cap * head.keys[positions] - key_mean),
        own_cap * head.own_slopes[positions],
    )


class Factored(NamedTuple):
    """J_i = scale_i (I - left_i right_i) for a block of b positions."""

    scale: Float[Array, " b"]
    left: Float[Array, "b d r"]
    right: Float[Array, "b r d"]


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
    alpha, c = (share[:, None, None] for share in view.shares[:2])
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
        return Factored(jnp.ones_like(view.shares.own_share), left, right)
    view = view_from(layer, head, inputs, positions, reading)
    left = view.covariance
    right = jnp.broadcast_to(head.query, (positions.shape[0], *head.query.shape))
    if reading.inclusive:
        extra = view.shares.own_share[:, None] * view.offset
        slope = view.slope_offset @ head.query + view.own_slope @ head.key
        left = jnp.concatenate([left, extra[:, :, None]], 2)
        right = jnp.concatenate([right, slope[:, None]], 1)
    return Factored(view.shares.past_share, left, right)


def smallest_singular_value(factored: Factored) -> Float[Array, " b"]:
    """sigma_min(J_i), found in the span of left and right^T where its 2r dimensions are fewer than d.

    Outside the span J_i is its scale c times identity, and inside it sigma_min is at most c: if the span has 2r
    dimensions, J^T J / c^2 - I is congruent there to [[left^T left, -I], [-I, 0]], which has r negative eigenvalues; if
    it has fewer, QR completes the basis with directions from outside.
    """
    scale, left, right = factored
    rank, width = right.shape[1:]
    if 2 * rank >= width:
        dense = scale[:, None, None] * (jnp.eye(width, dtype=left.dtype) - left @ right)
        return jnp.linalg.svd(dense, compute_uv=False)[:, -1]
    basis, _ = jnp.linalg.qr(jnp.concatenate([left, jnp.swapaxes(right, 1, 2)], 2))
    core = jnp.eye(2 * rank, dtype=left.dtype) - (jnp.swapaxes(basis, 1, 2) @ left) @ (right @ basis)
    return scale * jnp.linalg.svd(core, compute_uv=False)[:, -1]


def _bordered(layer: Attention, head: Head, view: View, positions: Int[Array, " b"]) -> Float[Array, "b r r"]:
    """B A of the module docstring for identity values with the position itself included."""
    own_share, _, _, weights, slopes = view.shares
    through_keys = view.own_slope @ head.unbiased_keys.T
    mean = (weights * through_keys).sum(-1, keepdims=True)
    share = weights * (through_keys - mean)
    if slopes is not None:
        share = share * slopes
    past = pulled_to_query(layer, head, positions, share @ head.keys)
    row = jnp.einsum("bf,bfp->bp", view.slope_offset, view.covariance) + past
    own = jnp.take_along_axis(through_keys, positions[:, None], 1) - mean
    corner = (view.slope_offset * view.offset).sum(-1, keepdims=True) + own
    column = jnp.concatenate([view.offset, corner], 1) * own_share[:, None]
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
            log_scale = layer.width * view.shares.log_past_share
    sign, log_det = jnp.linalg.slogdet(jnp.eye(product.shape[1], dtype=product.dtype) - product)
    if log_scale is None:
        return LogDet(sign, log_det)
    # Without a past c = 0: the position attends to itself alone and J_i is the zero matrix.
    return LogDet(jnp.where(jnp.isfinite(log_scale), sign, 0), log_scale + log_det)
