"""The decoder-only transformer as a deterministic map: tokens or embeddings to the logits of every next token.

    stream_0 = u,   u_i = token_embedding[x_i] + position_embedding[i]                                `embed`
    x = norm(stream),   stream <- stream + sum_h W_O^h sum_{s <= i} alpha^h_is W_V^h x_s              attention
    stream <- stream + W_down gelu(W_up norm(stream))                                                 mlp
    logits = W_head norm(stream)                                                                      `decode`

Normalised before attention and mlp ("pre-norm"), learned positions, no biases but those of the norms. As real decoders
do, and unlike the process, a position attends to itself too; margins are those of the strict past (`Block.attention`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from prob_transformer._validation import require_count, require_integers, require_vocabulary
from prob_transformer.attention import Attention
from prob_transformer.margins import Values

Remat = Literal["none", "blocks"]

# Called with the name of a linear map, its inputs, one row a position, and its outputs, heads first and positions last
# where there are heads; what it returns goes on in place of the outputs. Through it the maps are looked at. A block
# also calls it under "stream" with its input stream (n, d) twice: as inputs, and as the outputs that it goes on with.
Hook = Callable[[str, Float[Array, "n a"], Float[Array, "..."]], Float[Array, "..."]]


@dataclass(frozen=True)
class TransformerConfig:
    """The sizes of a `Transformer`: tokens in the vocabulary, positions, layers, width d, heads H, head size p, mlp.

    `head_size` is width / heads unless given, `hidden` of the mlp 4 * width. Raises ValueError for sizes below 1, and
    for heads that do not divide the width where no head size is given.
    """

    vocabulary: int
    context: int
    layers: int = 2
    width: int = 64
    heads: int = 4
    head_size: int | None = None
    hidden: int | None = None

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            if size is not None:
                require_count(name, size, 1, "a size of the transformer")
        if self.head_size is None and self.width % self.heads:
            raise ValueError(f"heads: got {self.heads}; pass a divisor of the width, {self.width}, or a head_size.")

    @property
    def size_of_heads(self) -> int:
        return self.head_size or self.width // self.heads

    @property
    def mlp_width(self) -> int:
        return self.hidden or 4 * self.width


def _unchanged(name: str, inputs: Float[Array, "n a"], outputs: Float[Array, "..."]) -> Float[Array, "..."]:
    return outputs


def _normal(key: PRNGKeyArray, shape: tuple[int, ...], scale: float, dtype: DTypeLike) -> Float[Array, "..."]:
    return scale * jax.random.normal(key, shape, dtype)


class LayerNorm(eqx.Module):
    """Zero mean and unit variance over the last axis, then scale and bias of shape (d,)."""

    scale: Float[Array, " d"]
    bias: Float[Array, " d"]

    def __init__(self, width: int, dtype: DTypeLike = jnp.float32):
        self.scale, self.bias = jnp.ones(width, dtype), jnp.zeros(width, dtype)

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

    def __init__(self, key: PRNGKeyArray, config: TransformerConfig, dtype: DTypeLike = jnp.float32):
        width, heads = config.width, config.heads
        size, hidden = config.size_of_heads, config.mlp_width
        keys = jax.random.split(key, 6)
        small = 1 / math.sqrt(2 * config.layers)
        self.query, self.key, self.value = (
            _normal(k, (heads, size, width), 1 / math.sqrt(width), dtype) for k in (keys[0], keys[1], keys[2])
        )
        self.output = _normal(keys[3], (heads, width, size), small / math.sqrt(width), dtype)
        self.up = _normal(keys[4], (hidden, width), 1 / math.sqrt(width), dtype)
        self.down = _normal(keys[5], (width, hidden), small / math.sqrt(hidden), dtype)
        self.attention_norm, self.mlp_norm = LayerNorm(width, dtype), LayerNorm(width, dtype)

    def attention(self, values: Values = "identity") -> Attention:
        """The heads of the layer for its margins: with identity values, or with the layer's own, W_O W_V."""
        own = (self.value, self.output) if values == "own" else ()
        return Attention(self.query, self.key, *own)

    def project(self, stream: Float[Array, "n d"], hook: Hook = _unchanged) -> tuple[Attended, Float[Array, "H p n"]]:
        """What the heads attend over, and the values."""
        inputs = self.attention_norm(stream)
        queries, keys, values = (
            hook(name, inputs, jnp.einsum("hpd,nd->hpn", weight, inputs))
            for name, weight in (("query", self.query), ("key", self.key), ("value", self.value))
        )
        return Attended(inputs, queries, keys), values

    def attend(
        self,
        stream: Float[Array, "n d"],
        queries: Float[Array, "H p n"],
        keys: Float[Array, "H p s"],
        values: Float[Array, "H p s"],
        visible: Bool[Array, "n s"],
        hook: Hook = _unchanged,
    ) -> Float[Array, "n d"]:
        """The stream after the block, when its positions attend to the keys and values that are visible to them."""
        logits = jnp.einsum("hpi,hps->his", queries, keys) / math.sqrt(self.query.shape[1])
        weights = jax.nn.softmax(jnp.where(visible, logits, -jnp.inf), axis=-1)
        # Read by a hook alone; without one the compiler leaves them out.
        averages = jnp.einsum("his,hps->ihp", weights, values).reshape(stream.shape[0], -1)
        stream = stream + hook("output", averages, jnp.einsum("hdp,his,hps->id", self.output, weights, values))
        normalised = self.mlp_norm(stream)
        hidden = jax.nn.gelu(hook("up", normalised, normalised @ self.up.T))
        return stream + hook("down", hidden, hidden @ self.down.T)

    def __call__(self, stream: Float[Array, "n d"], hook: Hook = _unchanged) -> tuple[Float[Array, "n d"], Attended]:
        """The stream after the block, and what its heads attended over."""
        stream = hook("stream", stream, stream)
        attended, values = self.project(stream, hook)
        length = stream.shape[0]
        # As real decoders do, and unlike the process: a position attends to itself too.
        visible = jnp.tril(jnp.ones((length, length), bool))
        return self.attend(stream, attended.queries, attended.keys, values, visible, hook), attended


class Transformer(eqx.Module):
    """Tokens (n,) to next-token logits (n, V), of the dtype that the weights promote to.

    The weights are drawn by the key: W_Q, W_K, W_V, up and head from N(0, 1 / d), output from N(0, 1 / (2 L d)), down
    from N(0, 1 / (2 L f)), embeddings from N(0, 0.01), with L layers and f units of the mlp. `prior_stage` is one head
    over the input embeddings with its own W_Q and W_K and identity values: the embedding prior. It shapes training
    where the barrier's site is "embedding", is the law of latent embeddings (`transformer_model`), and takes no part in
    prediction.
    """

    token_embedding: Float[Array, "V d"]
    position_embedding: Float[Array, "n d"]
    blocks: tuple[Block, ...]
    final_norm: LayerNorm
    head: Float[Array, "V d"]
    prior_stage: Attention

    def __init__(self, key: PRNGKeyArray, config: TransformerConfig, dtype: DTypeLike = jnp.float32):
        keys = jax.random.split(key, config.layers + 5)
        width, stage = config.width, (1, config.size_of_heads, config.width)
        self.token_embedding = _normal(keys[0], (config.vocabulary, width), 0.1, dtype)
        self.position_embedding = _normal(keys[1], (config.context, width), 0.1, dtype)
        self.head = _normal(keys[2], (config.vocabulary, width), 1 / math.sqrt(width), dtype)
        self.prior_stage = Attention(*(_normal(k, stage, 1 / math.sqrt(width), dtype) for k in keys[3:5]))
        self.blocks = tuple(Block(k, config, dtype) for k in keys[5:])
        self.final_norm = LayerNorm(width, dtype)

    @property
    def context(self) -> int:
        """How many tokens the model reads at most."""
        return self.position_embedding.shape[0]

    def embed(self, tokens: Int[Array, " n"]) -> Float[Array, "n d"]:
        """Input embeddings u: what the embedding prior is over and what noise is added to."""
        return self.token_embedding[tokens] + self.position_embedding[: tokens.shape[0]]

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
        return self.logits(stream, hook), jax.tree.map(lambda *x: jnp.stack(x), *layers)

    def logits(self, stream: Float[Array, "n d"], hook: Hook = _unchanged) -> Float[Array, "n V"]:
        """Logits from the stream after the last block."""
        normalised = self.final_norm(stream)
        return hook("head", normalised, normalised @ self.head.T)

    def __call__(self, tokens: Int[Array, " n"]) -> Float[Array, "n V"]:
        tokens = require_integers("tokens", tokens)
        if tokens.ndim != 1 or not 1 <= tokens.size <= self.context:
            raise ValueError(
                f"tokens: has shape {tokens.shape}; pass one text (n,), n from 1 to the context, {self.context}; "
                "several by jax.vmap."
            )
        require_vocabulary("tokens", tokens, self.head.shape[0])
        return self.decode(self.embed(tokens))[0]


def parameter_count(model: Transformer) -> int:
    """How many numbers training changes."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))
