"""Causal self-attention seen from one position: weights, weighted mean, weighted covariance.

Everything in this library is built from these three. For each head h, position i looks at its strict past s < i:

    q = W_Q u_i,   k_s = W_K u_s,   v_s = V u_s
    logit_s = q . k_s / sqrt(p)
    alpha_i = softmax over s < i                                    `attention_weights`
    mu_i    = sum_h sum_s alpha^h_is v^h_s                          `weighted_mean` of the values
    Cov_i(x, y) = sum_s alpha_is (x_s - x_mean)(y_s - y_mean)^T     `weighted_covariance`

Layers of trained decoders have more: biases, heads that share keys and values, a window, and norms, rotary positions
and a cap between q and the logits, cap(scale q^ . k^_s) with q^ = R_i norm(q) and k^_s = R_s norm(k_s). Nothing that
follows depends on them but through d logit_s / d q (`logit_slopes`): k_s / sqrt(p), if nothing stands in between.

The past is strict: with s <= i and identity values the first position has e_1 = u_1 - u_1 = 0, and so no density.
"""

import math
from typing import Any, SupportsIndex

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from prob_transformer._validation import (
    require_count,
    require_embeddings,
    require_finite,
    require_floating,
    require_positive,
)
from prob_transformer.logits import RMSNorm, Rotary
from prob_transformer.softmax import capped, softmax_weights


def _require_shape(name: str, array: Array | None, shape: tuple[int, ...], meaning: str) -> Array | None:
    if array is None:
        return None
    array = require_finite(name, array)
    if array.shape != shape:
        raise ValueError(f"{name}: has shape {array.shape}; pass {meaning} = {shape}.")
    return array


class Attention(eqx.Module):
    """Strictly causal attention with H heads of size p on inputs of width d, as a JAX pytree.

    `query` is W_Q (H, p, d), `key` W_K (G, p, d) for G key groups, G = H where each head has its own. `value` is V
    (G, d, d), or with `output` W_O (H, d, v) of shape (G, v, d), so that V = W_O W_V; None for identity values, the
    paper's case as reported second-hand, with which heads exist alone only. A bias of the values moves mu by a constant
    and no derivative, so it is not asked for.

    `query_bias` (H, p) and `key_bias` (G, p); `query_norm` and `key_norm` of each head; `rotary` positions; with
    `window` w position i sees s > i - w only; `scale` of the logits, 1 / sqrt(p) unless given; `cap` c bounds a logit z
    to c tanh(z / c). Raises ValueError for shapes that do not fit, and for NaN or inf.
    """

    query: Float[Array, "H p d"]
    key: Float[Array, "G p d"]
    value: Float[Array, "G v d"] | None
    output: Float[Array, "H d v"] | None
    query_bias: Float[Array, "H p"] | None
    key_bias: Float[Array, "G p"] | None
    query_norm: RMSNorm | None
    key_norm: RMSNorm | None
    rotary: Rotary | None
    window: int | None = eqx.field(static=True)
    scale: float = eqx.field(static=True)
    cap: float | None = eqx.field(static=True)

    def __init__(
        self,
        query: Float[Array, "H p d"],
        key: Float[Array, "G p d"],
        value: Float[Array, "G v d"] | None = None,
        output: Float[Array, "H d v"] | None = None,
        *,
        query_bias: Float[Array, "H p"] | None = None,
        key_bias: Float[Array, "G p"] | None = None,
        query_norm: RMSNorm | None = None,
        key_norm: RMSNorm | None = None,
        rotary: Rotary | None = None,
        window: SupportsIndex | None = None,
        scale: float | None = None,
        cap: float | None = None,
    ):
        query, key = require_finite("query", query), require_finite("key", key)
        if query.ndim != 3 or 0 in query.shape:
            raise ValueError(f"query: has shape {query.shape}; pass (H, p, d): heads, head size, width.")
        heads, size, width = query.shape
        if key.ndim != 3 or key.shape[0] == 0 or key.shape[1:] != (size, width) or heads % key.shape[0]:
            raise ValueError(
                f"key: has shape {key.shape}; pass the shape of query, {query.shape}, or (G, {size}, {width}) with G a "
                f"divisor of H = {heads}."
            )
        groups = key.shape[0]
        if value is None and output is not None:
            raise ValueError("output: given without value; pass both, or neither for identity values.")
        if value is not None:
            value = require_floating("value", value)
            inner = width if output is None or value.ndim != 3 else value.shape[1]
            value = _require_shape("value", value, (groups, inner, width), "(G, v, d), v = d without an output,")
            output = _require_shape("output", output, (heads, width, inner), "(H, d, v)")
        for name, norm in (("query_norm", query_norm), ("key_norm", key_norm)):
            if norm is not None:
                if not isinstance(norm, RMSNorm):
                    raise ValueError(f"{name}: got {type(norm).__name__}; pass an RMSNorm(gain, epsilon).")
                _require_shape(name, norm.gain, (size,), "a gain (p,)")
                require_positive(f"{name}.epsilon", norm.epsilon)
        if rotary is not None and not isinstance(rotary, Rotary):
            raise ValueError(f"rotary: got {type(rotary).__name__}; pass a Rotary(frequencies).")
        if rotary is not None and 2 * rotary.frequencies.shape[0] > size:
            raise ValueError(
                f"rotary: has {rotary.frequencies.shape[0]} frequencies; pass at most p / 2 for head size p = {size}."
            )
        if window is not None:
            require_count("window", window, 1, "a window counts the position itself, so that 1 leaves no past")
            # JAX takes NumPy's numbers for arrays, which a static field must not be.
            window = int(window)
        for name, number in (("scale", scale), ("cap", cap)):
            if number is not None and require_positive(name, number).ndim:
                raise ValueError(f"{name}: has shape {jnp.shape(number)}; pass one number.")
        self.query, self.key, self.value, self.output = query, key, value, output
        self.query_bias = _require_shape("query_bias", query_bias, (heads, size), "(H, p)")
        self.key_bias = _require_shape("key_bias", key_bias, (groups, size), "(G, p)")
        self.query_norm, self.key_norm, self.rotary, self.window = query_norm, key_norm, rotary, window
        self.scale = 1 / math.sqrt(size) if scale is None else float(scale)
        self.cap = None if cap is None else float(cap)

    @property
    def heads(self) -> int:
        return self.query.shape[0]

    @property
    def head_size(self) -> int:
        return self.query.shape[1]

    @property
    def width(self) -> int:
        return self.query.shape[2]

    @property
    def group_of_head(self) -> Int[Array, " H"]:
        """Which of the G key groups each head reads."""
        return jnp.arange(len(self.query)) // (len(self.query) // len(self.key))

    def of_heads(self, x: Float[Array, "G ..."]) -> Float[Array, "H ..."]:
        """What belongs to the key groups, once for each head."""
        return x if self.key.shape[0] == self.heads else x[self.group_of_head]

    @property
    def is_bilinear(self) -> bool:
        """Whether logits are scale q . k_s, with no rotation, norm or cap in between."""
        return self.rotary is None and self.query_norm is None and self.cap is None

    @property
    def interaction(self) -> Float[Array, "H d d"]:
        """A_h = scale W_K^T W_Q: the logit of past position s for query i is u_s^T A_h u_i if nothing is between."""
        return self.scale * jnp.einsum("hpa,hpb->hab", self.of_heads(self.key), self.query)

    def head_alone(self, head: Int[Array, ""] | int) -> "Attention":
        """One head with identity values, as heads are looked at alone. Raises ValueError for a number out of range."""
        if not isinstance(head, jax.core.Tracer) and not 0 <= int(head) < self.heads:
            raise ValueError(f"head: got {head}; pass 0 to {self.heads - 1}.")
        group = self.group_of_head[head]
        return Attention(
            self.query[head][None],
            self.key[group][None],
            query_bias=None if self.query_bias is None else self.query_bias[head][None],
            key_bias=None if self.key_bias is None else self.key_bias[group][None],
            query_norm=self.query_norm,
            key_norm=self.key_norm,
            rotary=self.rotary,
            window=self.window,
            scale=self.scale,
            cap=self.cap,
        )

    def plain_queries(self, inputs: Float[Array, "... d"]) -> Float[Array, "H ... p"]:
        """q = W_Q u + b of every head."""
        return _with_bias(jnp.einsum("hpd,...d->h...p", self.query, inputs), self.query_bias)

    def seen_queries(self, plain: Float[Array, "H ... p"], positions: Int[Array, "..."]) -> Float[Array, "H ... p"]:
        """scale q^ = scale R_i norm(q), as the logits see them."""
        seen = plain if self.query_norm is None else self.query_norm(plain)
        return self.scale * (seen if self.rotary is None else self.rotary.turn(seen, positions))

    def plain_keys(self, inputs: Float[Array, "... d"]) -> Float[Array, "G ... p"]:
        """k = W_K u + b of every key group."""
        return _with_bias(jnp.einsum("gpd,...d->g...p", self.key, inputs), self.key_bias)

    def seen_keys(self, plain: Float[Array, "G ... p"], positions: Int[Array, "..."]) -> Float[Array, "G ... p"]:
        """k^ = R_s norm(k), as the logits see them."""
        seen = plain if self.key_norm is None else self.key_norm(plain)
        return seen if self.rotary is None else self.rotary.turn(seen, positions)

    def values(self, inputs: Float[Array, "... d"]) -> Float[Array, "H ... d"]:
        """v = V u of every head, or u itself for identity values."""
        if self.value is None:
            return jnp.broadcast_to(inputs, (self.heads, *inputs.shape))
        values = self.of_heads(jnp.einsum("gvd,...d->g...v", self.value, inputs))
        return values if self.output is None else jnp.einsum("hdv,h...v->h...d", self.output, values)

    def value_maps(self, left: Float[Array, "a d"]) -> Float[Array, "H a d"]:
        """left V_h of every head, as matrices. Raises ValueError where values are the identity."""
        if self.value is None:
            raise ValueError("value: is None; identity values need no maps.")
        value = self.of_heads(self.value)
        if self.output is None:
            return jnp.einsum("ad,hde->hae", left, value)
        return jnp.einsum("hav,hve->hae", jnp.einsum("ad,hdv->hav", left, self.output), value)

    def sees(self, positions: Int[Array, "..."], past: Int[Array, "..."]) -> Bool[Array, "..."]:
        """Whether a position attends to another one, under this layer's window."""
        return is_past(positions, past, self.window)


def is_past(positions: Int[Array, "..."], past: Int[Array, "..."], window: int | None = None) -> Bool[Array, "..."]:
    """Whether a position may be attended to by another one: s < i, and s > i - w under a window."""
    distance = positions - past
    recent = True if window is None else distance < window
    return (distance > 0) & recent


def require_attention(attention: Any) -> None:
    """Raises ValueError unless it is an Attention whose heads may be taken together: one, or with value maps."""
    if not isinstance(attention, Attention):
        raise ValueError(f"attention: got {type(attention).__name__}; pass an Attention.")
    heads, _, width = attention.query.shape
    if attention.value is None and heads > 1:
        raise ValueError(
            f"value: is None with H = {heads} heads; identity values exist for H = 1 only, "
            f"pass value maps of shape ({heads}, {width}, {width}), or look at each head alone by layer_margins."
        )


def require_joint(name: str, embeddings: Any, attention: Attention) -> Float[Array, "... n d"]:
    """The embeddings checked, and the attention, whose heads are taken together."""
    require_attention(attention)
    return require_embeddings(name, embeddings, attention.width)


def require_layer(pair: Any) -> tuple[Attention, Float[Array, "... n d"]]:
    """A layer and its inputs (..., n, d), checked."""
    if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], Attention)):
        raise ValueError(f"got {type(pair).__name__}; pass a pair (Attention, inputs).")
    return pair[0], require_embeddings("inputs", pair[1], pair[0].width)


def _with_bias(x: Float[Array, "H ... p"], bias: Float[Array, "H p"] | None) -> Float[Array, "H ... p"]:
    return x if bias is None else x + bias.reshape(bias.shape[0], *(1,) * (x.ndim - 2), bias.shape[1])


class Past(eqx.Module):
    """What attention needs of the positions that may be attended to: a key-value cache, and where the query stands.

    `keys` k^_s (H, n, p); `values` V u_s (H, n, d); `query_values` (H, n, H * p), the values seen through the queries
    of all heads, W_Q V u_s, from which the low-rank determinant is built; `visible` (n,), the rows that count;
    `position` (), that of the query.
    """

    keys: Float[Array, "H n p"]
    values: Float[Array, "H n d"]
    query_values: Float[Array, "H n Hp"]
    visible: Bool[Array, " n"]
    position: Int[Array, ""]

    @classmethod
    def of(
        cls, attention: Attention, embeddings: Float[Array, "n d"], length: Int[Array, ""] | int | None = None
    ) -> "Past":
        """The cache of the given embeddings for the query that follows them, or only the first `length` of them."""
        length = jnp.asarray(embeddings.shape[0] if length is None else length)
        rows = _rows(attention, embeddings, jnp.arange(embeddings.shape[0]))
        return cls(*rows, attention.sees(length, jnp.arange(embeddings.shape[0])), length)

    @classmethod
    def empty(cls, attention: Attention, length: int, dtype: DTypeLike | None = None) -> "Past":
        """A cache with room for `length` positions, none of them there yet."""
        dtype = attention.query.dtype if dtype is None else dtype
        return cls.of(attention, jnp.zeros((length, attention.width), dtype), 0)

    def write(self, attention: Attention, embedding: Float[Array, " d"]) -> "Past":
        """The cache with one more embedding stored where the query stood, for the query that follows it."""
        rows = _rows(attention, embedding[None], self.position[None])
        kept = self.keys, self.values, self.query_values
        keys, values, query_values = (
            old.at[:, self.position].set(new[:, 0]) for old, new in zip(kept, rows, strict=True)
        )
        position = self.position + 1
        visible = attention.sees(position, jnp.arange(self.keys.shape[1]))
        return Past(keys, values, query_values, visible, position)

    def before(self, attention: Attention, position: Int[Array, ""] | int) -> "Past":
        """The same cache as the query at `position` sees it."""
        visible = attention.sees(jnp.asarray(position), jnp.arange(self.keys.shape[1]))
        return Past(self.keys, self.values, self.query_values, visible, jnp.asarray(position))


def _rows(
    attention: Attention, embeddings: Float[Array, "n d"], positions: Int[Array, " n"]
) -> tuple[Float[Array, "H n p"], Float[Array, "H n d"], Float[Array, "H n Hp"]]:
    keys = attention.of_heads(attention.seen_keys(attention.plain_keys(embeddings), positions))
    values = attention.values(embeddings)
    stacked_query = attention.query.reshape(-1, attention.width)
    return keys, values, jnp.einsum("qd,hsd->hsq", stacked_query, values)


def weights_of_queries(attention: Attention, past: Past, queries: Float[Array, "H p"]) -> Float[Array, "H n"]:
    """alpha of the plain queries q: softmax of the logits over the visible past, all zero when the past is empty."""
    seen = attention.seen_queries(queries, past.position)[..., None]
    keys = jnp.swapaxes(past.keys, 1, 2)
    return softmax_weights(seen, keys, past.visible[:, None], attention.cap).all[..., 0]


def attention_weights(attention: Attention, past: Past, embedding: Float[Array, " d"]) -> Float[Array, "H n"]:
    """alpha_i: softmax of the logits over the visible past, zero elsewhere and all zero when the past is empty."""
    return weights_of_queries(attention, past, attention.plain_queries(embedding))


def logit_slopes(attention: Attention, past: Past, queries: Float[Array, "H p"]) -> Float[Array, "H n p"]:
    """g_s = d logit_s / d q of each head at the plain queries q: k_s / sqrt(p) where nothing stands in between."""
    if attention.is_bilinear:
        return attention.scale * past.keys

    def logits(query: Float[Array, " p"], keys: Float[Array, "n p"]) -> Float[Array, " n"]:
        return capped(keys @ attention.seen_queries(query[None], past.position)[0], attention.cap)

    return jax.vmap(jax.jacfwd(logits))(queries, past.keys)


def weighted_mean(weights: Float[Array, " n"], x: Float[Array, "n a"]) -> Float[Array, " a"]:
    """sum_s alpha_s x_s."""
    return weights @ x


def weighted_covariance(
    weights: Float[Array, " n"], x: Float[Array, "n a"], y: Float[Array, "n b"]
) -> Float[Array, "a b"]:
    """Cov under the weights of the rows of x with the rows of y, centred first so that nothing cancels.

    Rows are taken relative to the one of the largest weight before they are centred: rows that coincide with it, or
    nearly, then lose no digits to a mean that is rounded.
    """
    heaviest = jnp.argmax(weights)
    x, y = x - x[heaviest][None], y - y[heaviest][None]
    centred_x = x - weighted_mean(weights, x)[None]
    centred_y = y - weighted_mean(weights, y)[None]
    # Weights first: where they are 0, the product of two large numbers may not be finite.
    return (weights[:, None] * centred_x).T @ centred_y
