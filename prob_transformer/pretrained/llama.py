"""A decoder of the Llama family from its weights by name, wherever they are stored.

Root-mean-square norms, rotary positions, grouped keys and values, SwiGLU perceptrons; no biases but, in some members,
those of queries, keys and values.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from prob_transformer.attention import Attention
from prob_transformer.logits import RMSNorm, Rotary
from prob_transformer.pretrained.model import Block, Decoder, SwiGLU

# Name and layer of a weight, as in `Block` and `Decoder`, to its values (out, in), or None where a model has none.
Weights = Callable[..., np.ndarray | None]


class LlamaShape(NamedTuple):
    """Of a Llama decoder: number of tokens, width, hidden width of its perceptrons, numbers of layers and heads."""

    tokens: int
    width: int
    hidden: int
    layers: int
    heads: int
    key_heads: int
    head_size: int
    context: int
    epsilon: float
    window: int | None = None


def shaped(name: str, array: np.ndarray | None, *shape: int) -> Array:
    """The weight in float32. Raises ValueError if it is missing, not finite or of another shape than given."""
    if array is None:
        raise ValueError(f"weights: no {name}; the file is not of this architecture or not whole.")
    if array.shape != shape:
        raise ValueError(f"weights: {name} has shape {array.shape}, which its configuration does not allow: {shape}.")
    if not np.isfinite(array).all():
        raise ValueError(f"weights: {name} contains NaN or inf; the file is damaged, or its training diverged.")
    return jnp.asarray(array, jnp.float32)


def embeddings(tokens: int, width: int, embedding: np.ndarray | None, head: np.ndarray | None) -> tuple[Array, Array]:
    """Token embeddings (V, d) and head (V, d), the same where no head is stored.

    Raises ValueError where there are no embeddings, or shapes are not those of the configuration.
    """
    if embedding is not None and embedding.ndim == 2 and embedding.shape[0] != tokens:
        raise ValueError(
            f"weights: {embedding.shape[0]} embeddings, but the configuration gives vocab_size = {tokens}."
        )
    table = shaped("token embedding", embedding, tokens, width)
    return table, table if head is None else shaped("head", head, tokens, width)


def llama(shape: LlamaShape, weight: Weights, rotary: Rotary) -> Decoder:
    """The decoder in float32. Raises ValueError for weights that are missing or do not fit the shape."""
    width, heads, groups, size = shape.width, shape.heads, shape.key_heads, shape.head_size
    table, head = embeddings(shape.tokens, width, weight("token_embedding"), weight("head"))

    def block(layer: int) -> Block:
        def matrix(name: str, *expected: int) -> Array:
            return shaped(f"{name} of layer {layer}", weight(name, layer), *expected)

        def bias(name: str, *expected: int) -> Array | None:
            found = weight(name, layer)
            return None if found is None else shaped(f"{name} of layer {layer}", found, *expected)

        def of_heads(bias: Array | None) -> Array | None:
            return None if bias is None else bias.reshape(-1, size)

        output = matrix("output", width, heads * size).reshape(width, heads, size).transpose(1, 0, 2)
        attention = Attention(
            matrix("query", heads * size, width).reshape(heads, size, width),
            matrix("key", groups * size, width).reshape(groups, size, width),
            matrix("value", groups * size, width).reshape(groups, size, width),
            output,
            query_bias=of_heads(bias("query_bias", heads * size)),
            key_bias=of_heads(bias("key_bias", groups * size)),
            rotary=rotary,
            window=shape.window,
        )
        constant, value_bias = bias("output_bias", width), of_heads(bias("value_bias", groups * size))
        if value_bias is not None:
            # Weights sum to one, so each head passes its bias on unchanged.
            through = jnp.einsum("hdv,hv->d", output, value_bias[attention.group_of_head])
            constant = through if constant is None else constant + through
        perceptron = SwiGLU(
            matrix("gate", shape.hidden, width),
            matrix("up", shape.hidden, width),
            matrix("down", width, shape.hidden),
        )
        norms = [RMSNorm(matrix(name, width), shape.epsilon) for name in ("attention_norm", "perceptron_norm")]
        return Block(norms[0], attention, constant, norms[1], perceptron)

    return Decoder(
        token_embedding=table,
        position_embedding=None,
        blocks=tuple(block(layer) for layer in range(shape.layers)),
        final_norm=RMSNorm(shaped("final_norm", weight("final_norm"), width), shape.epsilon),
        head=head,
        context=shape.context,
    )
