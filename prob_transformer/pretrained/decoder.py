"""A pre-norm decoder that runs pretrained weights of the Llama and GPT-2 families, one layer at a time.

    stream += W_O attention(norm(stream)) + b_O,   stream += mlp(norm(stream)),   logits = norm(stream) . head

Every layer runs the same compiled function, and what a layer attended over is handed out as it is computed, so memory
holds one layer's numbers however deep the model is.
"""

from collections.abc import Iterator
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from prob_transformer.attention import Attention
from prob_transformer.logits import RMSNorm
from prob_transformer.softmax import capped

Tokens = Int[Array, " n"] | Int[np.ndarray, " n"]


class SwiGLU(eqx.Module):
    """W_down (silu(W_gate x) * W_up x), the MLP of the Llama family."""

    gate: Float[Array, "f d"]
    up: Float[Array, "f d"]
    down: Float[Array, "d f"]

    def __call__(self, x: Float[Array, "n d"]) -> Float[Array, "n d"]:
        return (jax.nn.silu(x @ self.gate.T) * (x @ self.up.T)) @ self.down.T


class GeluMLP(eqx.Module):
    """W_down gelu(W_up x + b_up) + b_down, the MLP of the GPT-2 family; gelu by its tanh form or exactly."""

    up: Float[Array, "f d"]
    up_bias: Float[Array, " f"]
    down: Float[Array, "d f"]
    down_bias: Float[Array, " d"]
    approximate: bool = eqx.field(static=True)

    def __call__(self, x: Float[Array, "n d"]) -> Float[Array, "n d"]:
        hidden = jax.nn.gelu(x @ self.up.T + self.up_bias, approximate=self.approximate)
        return hidden @ self.down.T + self.down_bias


def _visible_logits(
    layer: Attention, queries: Float[Array, "H r p"], keys: Float[Array, "G n p"], positions: Int[Array, " r"]
) -> Float[Array, "H r n"]:
    logits = capped(jnp.einsum("hip,hsp->his", queries, layer.of_heads(keys)), layer.cap)
    own, others = positions[:, None], jnp.arange(keys.shape[1])[None]
    return jnp.where(layer.sees(own, others) | (own == others), logits, -jnp.inf)


def attention_logits(layer: Attention, inputs: Float[Array, "n d"]) -> Float[Array, "H n n"]:
    """Logits with which each position attends to its past and itself, -inf where it sees nothing."""
    positions = jnp.arange(inputs.shape[0])
    queries = layer.seen_queries(layer.plain_queries(inputs), positions)
    return _visible_logits(layer, queries, layer.seen_keys(layer.plain_keys(inputs), positions), positions)


class Kept(NamedTuple):
    """Keys and values of one layer at n positions, of the G groups that share them."""

    keys: Float[Array, "G n p"]
    values: Float[Array, "G n v"]


class Block(eqx.Module):
    """One layer. `output_bias` (d,) is what biases of values and output add to every position, or None."""

    attention_norm: RMSNorm | eqx.nn.LayerNorm
    attention: Attention
    output_bias: Float[Array, " d"] | None
    mlp_norm: RMSNorm | eqx.nn.LayerNorm
    mlp: SwiGLU | GeluMLP

    def _value(self) -> Float[Array, "G v d"]:
        if self.attention.value is None or self.attention.output is None:
            raise ValueError("attention: has no value or no output map; a decoder block needs both.")
        return self.attention.value

    def nothing_kept(self, count: int, room: int) -> Kept:
        """Keys and values of `count` texts with a leading axis, with room for `room` positions, none there yet."""
        matrices = self.attention.key, self._value()
        return Kept(*(jnp.zeros((count, x.shape[0], room, x.shape[1]), x.dtype) for x in matrices))

    def _kept(self, inputs: Float[Array, "r d"], positions: Int[Array, " r"]) -> Kept:
        layer = self.attention
        values = jnp.einsum("gvd,nd->gnv", self._value(), inputs)
        return Kept(layer.seen_keys(layer.plain_keys(inputs), positions), values)

    def _after(
        self, stream: Float[Array, "r d"], inputs: Float[Array, "r d"], positions: Int[Array, " r"], kept: Kept
    ) -> Float[Array, "r d"]:
        """The stream after the layer at some positions, of which and of whose past the keys and values are kept."""
        layer = self.attention
        queries = layer.seen_queries(layer.plain_queries(inputs), positions)
        weights = jax.nn.softmax(_visible_logits(layer, queries, kept.keys, positions), axis=-1)
        mixed = weights @ kept.values[layer.group_of_head]
        stream = stream + jnp.einsum("hdv,hiv->id", layer.output, mixed)
        if self.output_bias is not None:
            stream = stream + self.output_bias
        return stream + self.mlp(jax.vmap(self.mlp_norm)(stream))

    @jax.jit
    def __call__(self, stream: Float[Array, "n d"]) -> tuple[Float[Array, "n d"], Float[Array, "n d"]]:
        """The stream after the layer, and the normalised inputs that its heads attended over."""
        inputs, positions = jax.vmap(self.attention_norm)(stream), jnp.arange(stream.shape[0])
        return self._after(stream, inputs, positions, self._kept(inputs, positions)), inputs

    @jax.jit
    def read(self, stream: Float[Array, "r d"], kept: Kept, start: Int[Array, ""]) -> tuple[Float[Array, "r d"], Kept]:
        """The stream after the layer at r more positions from `start`, and what is kept with theirs written to it."""
        inputs, positions = jax.vmap(self.attention_norm)(stream), start + jnp.arange(stream.shape[0])
        new = self._kept(inputs, positions)
        kept = Kept(*(lax.dynamic_update_slice_in_dim(x, y, start, 1) for x, y in zip(kept, new, strict=True)))
        return self._after(stream, inputs, positions, kept), kept


class Decoder(eqx.Module):
    """A pretrained decoder: tokens (n,) to next-token logits (n, V). Where tied, `head` is the token embedding."""

    token_embedding: Float[Array, "V d"]
    position_embedding: Float[Array, "c d"] | None
    blocks: tuple[Block, ...]
    final_norm: RMSNorm | eqx.nn.LayerNorm
    head: Float[Array, "V d"]
    context: int = eqx.field(static=True)

    def embed(self, tokens: Tokens) -> Float[Array, "n d"]:
        """What enters the first layer, learned positions included. Raises ValueError for tokens that do not fit."""
        given = np.asarray(tokens)
        if given.ndim != 1 or given.size == 0 or not np.issubdtype(given.dtype, np.integer):
            raise ValueError("tokens: pass at least one token number, as integers (n,); was the text empty?")
        if given.size > self.context:
            raise ValueError(
                f"tokens: {given.size} do not fit the context of {self.context}; pass a shorter text or a part of it."
            )
        vocabulary = self.token_embedding.shape[0]
        if given.min() < 0 or given.max() >= vocabulary:
            raise ValueError(
                f"tokens: run from {given.min()} to {given.max()} but the model has {vocabulary} embeddings; "
                "pass the tokens of its own tokenizer."
            )
        stream = self.token_embedding[jnp.asarray(given)]
        return stream if self.position_embedding is None else stream + self.position_embedding[: given.size]

    def layers(self, tokens: Tokens) -> Iterator[tuple[Attention, Float[Array, "n d"]]]:
        """Each attention layer with the normalised inputs (n, d) that it attended over, run as it is read.

        Raises ValueError for tokens that do not fit.
        """
        stream = self.embed(tokens)
        for block in self.blocks:
            stream, inputs = block(stream)
            yield block.attention, inputs

    def logits(self, stream: Float[Array, "n d"]) -> Float[Array, "n V"]:
        """Next-token logits of the stream that leaves the last layer."""
        return jax.vmap(self.final_norm)(stream) @ self.head.T

    def logits_from(self, stream: Float[Array, "n d"]) -> Float[Array, "n V"]:
        """Next-token logits after every position when `stream` enters the first layer instead of embeddings."""
        for block in self.blocks:
            stream, _ = block(stream)
        return self.logits(stream)

    def __call__(self, tokens: Tokens) -> Float[Array, "n V"]:
        """Next-token logits after every position. Raises ValueError for tokens that do not fit."""
        return self.logits_from(self.embed(tokens))
