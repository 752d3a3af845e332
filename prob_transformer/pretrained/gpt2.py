"""A decoder of the GPT-2 family from its weights by name.

Layer norms, learned positions, one fused map for queries, keys and values, GELU perceptrons, biases everywhere. GPT-2
stores its maps input first, (in, out): x W + b.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from prob_transformer.attention import Attention
from prob_transformer.pretrained.llama import embeddings, shaped
from prob_transformer.pretrained.model import Block, Decoder, GeluPerceptron, LayerNorm


class Gpt2Shape(NamedTuple):
    """Of a GPT-2 decoder: number of tokens, width, hidden width of its perceptrons, numbers of layers and heads."""

    tokens: int
    width: int
    hidden: int
    layers: int
    heads: int
    context: int
    epsilon: float
    approximate: bool


def gpt2(shape: Gpt2Shape, weight: Callable[[str], np.ndarray | None]) -> Decoder:
    """The decoder in float32. Raises ValueError for weights that are missing or do not fit the shape."""
    width, hidden, heads = shape.width, shape.hidden, shape.heads
    size = width // heads

    def stored(name: str, *expected: int) -> Array:
        return shaped(name, weight(name), *expected)

    def norm(name: str) -> LayerNorm:
        return LayerNorm(stored(f"{name}.weight", width), stored(f"{name}.bias", width), shape.epsilon)

    def block(layer: int) -> Block:
        here = f"h.{layer}."
        # (in, 3, heads, size) to query, key and value, each (heads, size, in).
        fused = stored(f"{here}attn.c_attn.weight", width, 3 * width).reshape(width, 3, heads, size)
        fused = fused.transpose(1, 2, 3, 0)
        biases = stored(f"{here}attn.c_attn.bias", 3 * width).reshape(3, heads, size)
        output = stored(f"{here}attn.c_proj.weight", width, width).reshape(heads, size, width).transpose(0, 2, 1)
        attention = Attention(fused[0], fused[1], fused[2], output, query_bias=biases[0], key_bias=biases[1])
        # Weights sum to one, so each head passes the bias of its values on unchanged.
        constant = stored(f"{here}attn.c_proj.bias", width) + jnp.einsum("hdv,hv->d", output, biases[2])
        perceptron = GeluPerceptron(
            stored(f"{here}mlp.c_fc.weight", width, hidden).T,
            stored(f"{here}mlp.c_fc.bias", hidden),
            stored(f"{here}mlp.c_proj.weight", hidden, width).T,
            stored(f"{here}mlp.c_proj.bias", width),
            shape.approximate,
        )
        return Block(norm(f"{here}ln_1"), attention, constant, norm(f"{here}ln_2"), perceptron)

    table, head = embeddings(shape.tokens, width, weight("wte.weight"), weight("lm_head.weight"))
    return Decoder(
        token_embedding=table,
        position_embedding=stored("wpe.weight", shape.context, width),
        blocks=tuple(block(layer) for layer in range(shape.layers)),
        final_norm=norm("ln_f"),
        head=head,
        context=shape.context,
    )
