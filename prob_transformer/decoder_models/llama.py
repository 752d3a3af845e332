"""A decoder of the Llama family from its weights by name, wherever they are stored.

Root-mean-square norms, rotary positions, grouped keys and values, SwiGLU perceptrons; no biases but, in some members,
those of queries, keys and values.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from prob_transformer.decoder import DecoderAttention, Rotary
from prob_transformer.decoder_models.model import Block, Decoder, RMSNorm, SwiGLU

# Name and layer of a weight, as in `Block` and `Decoder`, to its values (out, in), or None where a model has none.
Weights = Callable[..., np.ndarray | None]


class LlamaShape(NamedTuple):
    """What a Llama decoder's weights do not say of themselves."""

    layers: int
    heads: int
    key_heads: int
    head_size: int
    context: int
    epsilon: float
    window: int | None = None


def shaped(name: str, array: np.ndarray | None, shape: tuple[int, ...]) -> Array:
    """The weight in float32 and the shape given. Raises ValueError if it is missing or holds another count."""
    if array is None:
        raise ValueError(f"weights: no {name}; the file is not of this architecture or not whole.")
    if array.size != np.prod(shape):
        raise ValueError(f"weights: {name} has shape {array.shape}, which its configuration does not allow: {shape}.")
    return jnp.asarray(np.ascontiguousarray(array).reshape(shape), jnp.float32)


def llama(shape: LlamaShape, weight: Weights, rotary: Rotary) -> Decoder:
    """The decoder in float32. Raises ValueError for weights that are missing or do not fit the shape."""
    embedding = weight("token_embedding")
    if embedding is None or embedding.ndim != 2:
        raise ValueError("weights: no token embedding of two axes; the file is not of this architecture.")
    tokens, width = embedding.shape
    heads, groups, size = shape.heads, shape.key_heads, shape.head_size

    def vector(name: str, layer: int | None = None) -> Array:
        return shaped(name, weight(name, layer), (width,))

    def block(layer: int) -> Block:
        def matrix(name: str, *expected: int) -> Array:
            return shaped(f"{name} of layer {layer}", weight(name, layer), expected)

        def bias(name: str, *expected: int) -> Array | None:
            found = weight(name, layer)
            return None if found is None else shaped(f"{name} of layer {layer}", found, expected)

        output = matrix("output", width, heads, size).transpose(1, 0, 2)
        attention = DecoderAttention(
            matrix("query", heads, size, width),
            matrix("key", groups, size, width),
            matrix("value", groups, size, width),
            output,
            query_bias=bias("query_bias", heads, size),
            key_bias=bias("key_bias", groups, size),
            rotary=rotary,
            window=shape.window,
        )
        constant, value_bias = bias("output_bias", width), bias("value_bias", groups, size)
        if value_bias is not None:
            # Weights sum to one, so each head passes its bias on unchanged.
            through = jnp.einsum("hdv,hv->d", output, value_bias[attention.group_of_head])
            constant = through if constant is None else constant + through
        gate = weight("gate", layer)
        hidden = 0 if gate is None else gate.shape[0]
        perceptron = SwiGLU(matrix("gate", hidden, width), matrix("up", hidden, width), matrix("down", width, hidden))
        norms = [RMSNorm(vector(name, layer), shape.epsilon) for name in ("attention_norm", "perceptron_norm")]
        return Block(norms[0], attention, constant, norms[1], perceptron)

    table = shaped("token_embedding", embedding, (tokens, width))
    head = weight("head")
    return Decoder(
        token_embedding=table,
        position_embedding=None,
        blocks=tuple(block(layer) for layer in range(shape.layers)),
        final_norm=RMSNorm(vector("final_norm"), shape.epsilon),
        head=table if head is None else shaped("head", head, (tokens, width)),
        context=shape.context,
    )
