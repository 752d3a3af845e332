"""What may stand between queries, keys and their logits: rotary positions, and a norm of each head."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from prob_transformer._dtypes import ranks_promoted
from prob_transformer._validation import require_finite, require_floating


class RMSNorm(eqx.Module):
    """x / root mean square over the last axis, times a gain (d,)."""

    gain: Float[Array, " d"]
    epsilon: float = eqx.field(static=True)

    def __init__(self, gain: Float[Array, " d"], epsilon: float):
        self.gain, self.epsilon = require_floating("gain", gain), epsilon

    @ranks_promoted
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        return self.gain * x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)

    @ranks_promoted
    def slope(self, x: Float[Array, "... d"]) -> tuple[Float[Array, "... d"], Float[Array, "... d"]]:
        """gain and direction of its derivative diag(gain) (I - direction direction^T)."""
        inverse = jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
        return self.gain * inverse, x * inverse / math.sqrt(x.shape[-1])


class Rotary(eqx.Module):
    """Rotary positions: coordinate pair j of position s is turned by s * frequencies[j] radians.

    Pairs are (j, j + r), the half-split layout of Hugging Face weights, or (2j, 2j + 1) where `interleaved`, the layout
    of GGUF files of the Llama family; coordinates from 2r on are left alone. A model with the wrong one still talks.
    """

    frequencies: Float[Array, " r"]
    interleaved: bool = eqx.field(static=True)

    def __init__(self, frequencies: Float[Array, " r"], interleaved: bool = False):
        frequencies = require_finite("frequencies", frequencies)
        if frequencies.ndim != 1 or frequencies.size == 0:
            raise ValueError(f"frequencies: has shape {frequencies.shape}; pass one frequency a pair, (r,).")
        self.frequencies, self.interleaved = frequencies, interleaved

    def angles(
        self, positions: Int[Array, " n"], dtype: DTypeLike, batch: tuple[int, ...] = ()
    ) -> Float[Array, "... r n"]:
        """By how much each pair is turned, positions last, for a batch of sequences."""
        angles = self.frequencies[:, None].astype(dtype) * positions.astype(dtype)[None]
        return jnp.broadcast_to(angles, (*batch, *angles.shape))

    def halves_first(self, x: Float[Array, "... p"]) -> Float[Array, "... p"]:
        """The coordinates in the half-split layout: all first of a pair, all second, and the rest."""
        if not self.interleaved:
            return x
        end = 2 * self.frequencies.shape[0]
        return jnp.concatenate([x[..., 0:end:2], x[..., 1:end:2], x[..., end:]], -1)

    @ranks_promoted
    def turn(self, x: Float[Array, "... p"], positions: Int[Array, "..."]) -> Float[Array, "... p"]:
        """R_s x_s for the position s of each row; R_s^T is R_{-s}."""
        count = self.frequencies.shape[0]
        # Half precision does not count beyond a few hundred positions.
        wide = jnp.promote_types(x.dtype, jnp.float32)
        angles = positions.astype(wide)[..., None] * self.frequencies.astype(wide)
        cosine, sine = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
        turned, rest = x[..., : 2 * count], x[..., 2 * count :]
        if self.interleaved:
            first, second = turned[..., ::2], turned[..., 1::2]
        else:
            first, second = turned[..., :count], turned[..., count:]
        pair = (first * cosine - second * sine, second * cosine + first * sine)
        whole = jnp.stack(pair, -1).reshape(turned.shape) if self.interleaved else jnp.concatenate(pair, -1)
        return jnp.concatenate([whole, rest], -1)
