"""One attention layer of a trained decoder, described by its weights: what its margins are computed from.

On the layer's own normalised inputs u_1..n of width d, head h with key group g = h // (H / G) computes

    q_i = R_i (W_Q^h u_i + b_Q^h),   k_s = R_s (W_K^g u_s + b_K^g),   logit_is = scale q_i . k_s
    mu_i = sum_s alpha_is v_s,       v_s = u_s, or W_O^h W_V^g u_s

with R_s the rotation of rotary positions, the identity without them. Learned positions need nothing here: they are
part of the inputs. A bias of the values moves mu_i by a constant and no derivative, so it is not asked for.
"""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from prob_transformer._validation import require_count, require_finite, require_floating, require_positive


class Rotary(eqx.Module):
    """Rotary positions: coordinate pair j of position s is turned by s * frequencies[j] radians.

    Pairs are (j, j + r), the half-split layout of Hugging Face weights, or (2j, 2j + 1) where `interleaved`, the layout
    of GGUF files of the Llama family; coordinates from 2r on are left alone. A model with the wrong one still talks.
    """

    frequencies: Float[Array, " r"]
    interleaved: bool = eqx.field(static=True)

    def __init__(self, frequencies: Float[Array, " r"], interleaved: bool = False):
        frequencies = require_floating("frequencies", frequencies)
        if frequencies.ndim != 1 or frequencies.size == 0:
            raise ValueError(f"frequencies: has shape {frequencies.shape}; pass one frequency a pair, (r,).")
        require_finite("frequencies", frequencies)
        self.frequencies, self.interleaved = frequencies, interleaved

    def halves_first(self, x: Float[Array, "... p"]) -> Float[Array, "... p"]:
        """The coordinates in the half-split layout: all first of a pair, all second, and the rest."""
        if not self.interleaved:
            return x
        end = 2 * self.frequencies.shape[0]
        return jnp.concatenate([x[..., 0:end:2], x[..., 1:end:2], x[..., end:]], -1)

    def turn(
        self, x: Float[Array, "... p"], positions: Int[Array, "..."], backwards: bool = False
    ) -> Float[Array, "... p"]:
        """R_s x_s for the position s of each row, or R_s^T x_s when turned backwards."""
        count = self.frequencies.shape[0]
        angles = positions.astype(x.dtype)[..., None] * self.frequencies.astype(x.dtype)
        cosine, sine = jnp.cos(angles), jnp.sin(angles)
        if backwards:
            sine = -sine
        turned, rest = x[..., : 2 * count], x[..., 2 * count :]
        if self.interleaved:
            first, second = turned[..., ::2], turned[..., 1::2]
        else:
            first, second = turned[..., :count], turned[..., count:]
        pair = (first * cosine - second * sine, second * cosine + first * sine)
        whole = jnp.stack(pair, -1).reshape(turned.shape) if self.interleaved else jnp.concatenate(pair, -1)
        return jnp.concatenate([whole, rest], -1)


def _require_shape(name: str, array: Any, shape: tuple[int, ...], meaning: str) -> Array:
    array = require_floating(name, array)
    if array.shape != shape:
        raise ValueError(f"{name}: has shape {array.shape}; pass {meaning} = {shape}.")
    require_finite(name, array)
    return array


class DecoderAttention(eqx.Module):
    """An attention layer of any causal decoder as a JAX pytree: H heads of size p, G key groups, inputs of width d.

    `query` (H, p, d), `key` (G, p, d); `value` (G, v, d) with `output` (H, d, v), or `value` (G, d, d) alone, or
    neither; biases (H, p) and (G, p); `rotary` or None; `window` = w lets position i see s > i - w only, None all of
    the past; `scale` of the logits, 1 / sqrt(p) unless given. Logits that are not a bilinear form of the inputs
    (normalised queries and keys, soft caps, added position biases) are not covered. Raises ValueError for what does
    not fit.
    """

    query: Float[Array, "H p d"]
    key: Float[Array, "G p d"]
    value: Float[Array, "G v d"] | None
    output: Float[Array, "H d v"] | None
    query_bias: Float[Array, "H p"] | None
    key_bias: Float[Array, "G p"] | None
    rotary: Rotary | None
    window: int | None = eqx.field(static=True)
    scale: float = eqx.field(static=True)

    def __init__(
        self,
        query: Float[Array, "H p d"],
        key: Float[Array, "G p d"],
        value: Float[Array, "G v d"] | None = None,
        output: Float[Array, "H d v"] | None = None,
        *,
        query_bias: Float[Array, "H p"] | None = None,
        key_bias: Float[Array, "G p"] | None = None,
        rotary: Rotary | None = None,
        window: int | None = None,
        scale: float | None = None,
    ):
        query, key = require_floating("query", query), require_floating("key", key)
        if query.ndim != 3 or 0 in query.shape:
            raise ValueError(f"query: has shape {query.shape}; pass (H, p, d): heads, head size, width of the inputs.")
        heads, size, width = query.shape
        if key.ndim != 3 or key.shape[0] == 0 or key.shape[1:] != (size, width) or heads % key.shape[0]:
            raise ValueError(
                f"key: has shape {key.shape}; pass (G, p, d) = (G, {size}, {width}) with G a divisor of H = {heads}."
            )
        groups = key.shape[0]
        require_finite("query", query)
        require_finite("key", key)
        if value is None:
            if output is not None:
                raise ValueError("output: given without value; pass both, or neither for identity values.")
        else:
            value = require_floating("value", value)
            inner = width if output is None or value.ndim != 3 else value.shape[1]
            value = _require_shape("value", value, (groups, inner, width), "(G, v, d), v = d without an output,")
            if output is not None:
                output = _require_shape("output", output, (heads, width, inner), "(H, d, v)")
        if query_bias is not None:
            query_bias = _require_shape("query_bias", query_bias, (heads, size), "(H, p)")
        if key_bias is not None:
            key_bias = _require_shape("key_bias", key_bias, (groups, size), "(G, p)")
        if rotary is not None and 2 * rotary.frequencies.shape[0] > size:
            raise ValueError(
                f"rotary: has {rotary.frequencies.shape[0]} frequencies; pass at most p / 2 for head size p = {size}."
            )
        if window is not None:
            require_count("window", window, 1, "a position sees at least itself")
        if scale is not None:
            require_positive("scale", scale)
        self.query, self.key, self.value, self.output = query, key, value, output
        self.query_bias, self.key_bias, self.rotary, self.window = query_bias, key_bias, rotary, window
        self.scale = 1 / math.sqrt(size) if scale is None else float(scale)

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
        return jnp.arange(self.heads) // (self.heads // self.key.shape[0])

    def turn(
        self, x: Float[Array, "... p"], positions: Int[Array, "..."], backwards: bool = False
    ) -> Float[Array, "... p"]:
        """R_s x_s for the position s of each row, or R_s^T x_s when turned backwards; x itself without rotary."""
        return x if self.rotary is None else self.rotary.turn(x, positions, backwards)


class Projected(NamedTuple):
    """Queries (H, n, p) and keys (G, n, p) of a layer's inputs, before and after the rotation.

    `plain_queries` W_Q u + b_Q, `queries` the same turned; `plain_keys` W_K u without bias, `keys` R_s (W_K u + b_K).
    """

    plain_queries: Float[Array, "H n p"]
    queries: Float[Array, "H n p"]
    plain_keys: Float[Array, "G n p"]
    keys: Float[Array, "G n p"]

    @classmethod
    def of(cls, layer: DecoderAttention, inputs: Float[Array, "n d"]) -> "Projected":
        """Of all heads and positions, numbered from 0."""
        positions = jnp.arange(inputs.shape[0])
        queries = jnp.einsum("hpd,nd->hnp", layer.query, inputs)
        plain_keys = keys = jnp.einsum("gpd,nd->gnp", layer.key, inputs)
        if layer.query_bias is not None:
            queries = queries + layer.query_bias[:, None]
        if layer.key_bias is not None:
            keys = keys + layer.key_bias[:, None]
        return cls(queries, layer.turn(queries, positions), plain_keys, layer.turn(keys, positions))
