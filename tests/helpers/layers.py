"""The library's layer with the weights of a plain one."""

import jax.numpy as jnp
import numpy as np

from prob_transformer import Attention, RMSNorm, Rotary
from tests.helpers.plain_decoder import EPSILON


def layer_of(plain, dtype=np.float64):
    def cast(x):
        return None if x is None else jnp.asarray(x, dtype)

    def norm(gain):
        return None if gain is None else RMSNorm(cast(gain), EPSILON)

    return Attention(
        *map(cast, plain[:4]),
        query_bias=cast(plain.query_bias),
        key_bias=cast(plain.key_bias),
        query_norm=norm(plain.query_gain),
        key_norm=norm(plain.key_gain),
        rotary=None if plain.frequencies is None else Rotary(cast(plain.frequencies), plain.interleaved),
        window=plain.window,
        cap=plain.cap,
    )
