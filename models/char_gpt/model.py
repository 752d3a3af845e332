"""A small pre-LayerNorm GPT whose heads keep W_Q and W_K apart, so that their margins can be looked at."""

import math
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from models.char_gpt.config import Config, Remat
from prob_transformer import Attention

# Called with the name of a linear map, its inputs, one row a position, and its outputs, heads first and positions last
# where there are heads; what it returns goes on in place of the outputs. Through it the maps are looked at. A block
# also calls it under "stream" with its input stream (n, d) twice: as inputs, and as the outputs that it goes on with.
Hook = Callable[[str, Float[Array, "n a"], Float[Array, "..."]], Float[Array, "..."]]


def _unchanged(name: str, inputs: Float[Array, "n a"], outputs: Float[Array, "..."]) -> Float[Array, "..."]:
    return outputs


def _normal(key: PRNGKeyArray, shape: tuple[int, ...], scale: float) -> Float[Array, "..."]:
    return scale * jax.random.normal(key, shape, jnp.float32)


class LayerNorm(eqx.Module):
    """Zero mean and unit variance over the last axis, then scale and bias of shape (d,)."""

    scale: Float[Array, " d"]
    bias: Float[Array, " d"]

    def __init__(self, width: int):
        self.scale, self.bias = jnp.ones(width, jnp.float32), jnp.zeros(width, jnp.float32)

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return self.scale * centred / jnp.sqrt(variance + 1e-5) + self.bias


class Attended(NamedTuple):
    """What the heads of a layer attended over: normalised inputs (n, d), and their queries and keys (H, p, n)."""

    inputs: Float[Array, "n d"]
    queries: Float[Array, "H p n"]
    keys: Float[Array, "H p n"]


class Block(eqx.Module):
    """Multi-head causal attention and a GELU mlp, each on normalised inputs and added to the stream."""

    query: Float[Array, "H p d"]
    key: Float[Array, "H p d"]
    value: Float[Array, "H p d"]
    output: Float[Array, "H d p"]
    up: Float[Array, "f d"]
    down: Float[Array, "d f"]
    attention_norm: LayerNorm
    mlp_norm: LayerNorm

    def __init__(self, key: PRNGKeyArray, config: Config):
        width, heads = config.width, config.heads
        size, hidden = width // heads, 4 * width
        keys = jax.random.split(key, 6)
        small = 1 / math.sqrt(2 * config.layers)
        self.query, self.key, self.value = (
            _normal(k, (heads, size, width), 1 / math.sqrt(width)) for k in (keys[0], keys[1], keys[2])
        )
        self.output = _normal(keys[3], (heads, width, size), small / math.sqrt(width))
        self.up = _normal(keys[4], (hidden, width), 1 / math.sqrt(width))
        self.down = _normal(keys[5], (width, hidden), small / math.sqrt(hidden))
        self.attention_norm, self.mlp_norm = LayerNorm(width), LayerNorm(width)

    def __call__(self, stream: Float[Array, "n d"], hook: Hook = _unchanged) -> tuple[Float[Array, "n d"], Attended]:
        """The stream after the block, and what its heads attended over."""
        stream = hook("stream", stream, stream)
        inputs = self.attention_norm(stream)
        length = stream.shape[0]
        queries, keys, values = (
            hook(name, inputs, jnp.einsum("hpd,nd->hpn", weight, inputs))
            for name, weight in (("query", self.query), ("key", self.key), ("value", self.value))
        )
        logits = jnp.einsum("hpi,hps->his", queries, keys) / math.sqrt(self.query.shape[1])
        # As real decoders do, and unlike the process: a position attends to itself too.
        visible = jnp.tril(jnp.ones((length, length), bool))
        weights = jax.nn.softmax(jnp.where(visible, logits, -jnp.inf), axis=-1)
        # Read by a hook alone; without one the compiler leaves them out.
        averages = jnp.einsum("his,hps->ihp", weights, values).reshape(length, -1)
        stream = stream + hook("output", averages, jnp.einsum("hdp,his,hps->id", self.output, weights, values))
        normalised = self.mlp_norm(stream)
        hidden = jax.nn.gelu(hook("up", normalised, normalised @ self.up.T))
        return stream + hook("down", hidden, hidden @ self.down.T), Attended(inputs, queries, keys)


class CharGPT(eqx.Module):
    """Characters (n,) to next-character logits (n, V), all float32.

    `prior_stage` is one head over the input embeddings with its own W_Q and W_K and identity values: the embedding
    prior. It shapes training where `barrier_site` is "embedding" and takes no part in prediction.
    """

    token_embedding: Float[Array, "V d"]
    position_embedding: Float[Array, "n d"]
    blocks: tuple[Block, ...]
    final_norm: LayerNorm
    head: Float[Array, "V d"]
    prior_stage: Attention

    def __init__(self, key: PRNGKeyArray, config: Config, vocabulary_size: int):
        keys = jax.random.split(key, config.layers + 5)
        width, size = config.width, config.width // config.heads
        self.token_embedding = _normal(keys[0], (vocabulary_size, width), 0.1)
        self.position_embedding = _normal(keys[1], (config.context, width), 0.1)
        self.head = _normal(keys[2], (vocabulary_size, width), 1 / math.sqrt(width))
        self.prior_stage = Attention(*(_normal(k, (1, size, width), 1 / math.sqrt(width)) for k in keys[3:5]))
        self.blocks = tuple(Block(k, config) for k in keys[5:])
        self.final_norm = LayerNorm(width)

    @property
    def context(self) -> int:
        """How many characters the model reads at most."""
        return self.position_embedding.shape[0]

    def embed(self, characters: Int[Array, " n"]) -> Float[Array, "n d"]:
        """Input embeddings u: what the embedding prior is over and what noise is added to."""
        return self.token_embedding[characters] + self.position_embedding[: characters.shape[0]]

    def decode(
        self, embeddings: Float[Array, "n d"], remat: Remat = "none", hook: Hook = _unchanged
    ) -> tuple[Float[Array, "n V"], Attended]:
        """Logits from input embeddings, and what every layer attended over, layers first.

        `hook` sees every linear map under its name, "head" or "0.query" in layer 0, and every block's input stream
        under "0.stream".
        """
        stream, layers = embeddings, []
        for index, block in enumerate(self.blocks):
            hook_of_layer: Hook = lambda name, *given, at=index: hook(f"{at}.{name}", *given)  # noqa: E731
            run = eqx.filter_checkpoint(block) if remat == "blocks" else block
            stream, attended = run(stream, hook_of_layer)
            layers.append(attended)
        normalised = self.final_norm(stream)
        logits = hook("head", normalised, normalised @ self.head.T)
        return logits, jax.tree.map(lambda *x: jnp.stack(x), *layers)

    def __call__(self, characters: Int[Array, " n"]) -> Float[Array, "n V"]:
        return self.decode(self.embed(characters))[0]


def parameter_count(model: CharGPT) -> int:
    """How many numbers training changes."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))
