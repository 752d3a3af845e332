"""Decoding token by token: which tokens the model reads, and the cache of their keys and values.

Learned positions end at the context n, so a longer text is read in windows. With g = floor(n / 2) + 1,

    window w = 0, 1, ...   is the tokens g w, ..., g w + n - 1, at positions 0, ..., n - 1
    after m tokens         the first window that ends at token m - 1 or later is read, up to that token

In other words: when the context is full and one more token comes, the last ceil(n / 2) tokens, that one among them,
become the new window at positions from 0, and the cache is made anew from them. That happens once in g tokens, so a
token costs no more than a constant times one pass of one row. The window depends on m alone, not on where a prompt
ends: a long prompt is read as if its tokens had come one by one. `next_token_logits` is the same without a cache.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from prob_transformer._validation import require_integers, require_vocabulary
from prob_transformer.transformer.network import Transformer

# Noise (r, d) on the embeddings of tokens, by their numbers (r,) in the text.
Noise = Callable[[Int[Array, " r"]], Float[Array, "r d"]]


def window_step(context: int) -> int:
    """g = floor(n / 2) + 1: how many tokens later the next window starts."""
    return context // 2 + 1


def window_number(count: Any, context: int) -> Any:
    """w = max(0, ceil((m - n) / g)): the window that is read after m tokens, for a number or an array of them."""
    return (count > context) * -((context - count) // window_step(context))


def window_start(count: Any, context: int) -> Any:
    """g w: the first token that is read after m tokens."""
    return window_step(context) * window_number(count, context)


class Cache(NamedTuple):
    """Keys and values (H, p, n) of every layer, at the positions of the window; what is not there yet is 0."""

    keys: tuple[Float[Array, "H p n"], ...]
    values: tuple[Float[Array, "H p n"], ...]

    @classmethod
    def empty(cls, transformer: Transformer) -> "Cache":
        # Weights with priors of their own may have several dtypes.
        read = transformer.token_embedding, transformer.position_embedding, transformer.blocks
        dtype = jnp.result_type(*jax.tree.leaves(read))
        rooms = tuple(jnp.zeros((*block.key.shape[:2], transformer.context), dtype) for block in transformer.blocks)
        return cls(rooms, rooms)

    def read(
        self, transformer: Transformer, embeddings: Float[Array, "r d"], start: Int[Array, ""] | int
    ) -> tuple[Float[Array, " V"], "Cache"]:
        """The logits after r more embeddings, at the positions from `start`, and the cache with them."""
        stream, found = embeddings, []
        positions = start + jnp.arange(embeddings.shape[0])
        visible = jnp.arange(transformer.context) <= positions[:, None]
        for block, *kept in zip(transformer.blocks, self.keys, self.values, strict=True):
            new, values = block.project(stream)
            keys, values = (
                lax.dynamic_update_slice_in_dim(x, y.astype(x.dtype), start, 2)
                for x, y in zip(kept, (new.keys, values), strict=True)
            )
            stream = block.attend(stream, new.queries, keys, values, visible)
            found.append((keys, values))
        return transformer.logits(stream[-1:])[0], Cache(*zip(*found, strict=True))


def window_embeddings(
    transformer: Transformer, tokens: Int[Array, " r"], start: Int[Array, ""] | int, noise: Noise | None
) -> Float[Array, "r d"]:
    """Input embeddings of a window of r tokens, of which `start` is the first in the text, with their noise."""
    embeddings = transformer.embed(tokens)
    return embeddings if noise is None else embeddings + noise(start + jnp.arange(tokens.shape[0]))


class Decoding(NamedTuple):
    """A text so far: `length` tokens () came; `tokens` (n,) are those of the window; `logits` (V,) of the next one."""

    tokens: Int[Array, " n"]
    length: Int[Array, ""]
    cache: Cache
    logits: Float[Array, " V"]

    @classmethod
    def of(cls, transformer: Transformer, prompt: Int[Array, " m"], noise: Noise | None = None) -> "Decoding":
        """The text of a prompt."""
        start = window_start(prompt.shape[0], transformer.context)
        return cls._of_window(transformer, prompt[start:], jnp.asarray(start), noise)

    @classmethod
    def _of_window(
        cls, transformer: Transformer, tokens: Int[Array, " r"], start: Int[Array, ""], noise: Noise | None
    ) -> "Decoding":
        count = tokens.shape[0]
        embeddings = window_embeddings(transformer, tokens, start, noise)
        logits, cache = Cache.empty(transformer).read(transformer, embeddings, 0)
        return cls(jnp.pad(tokens, (0, transformer.context - count)), start + count, cache, logits)

    def append(self, transformer: Transformer, token: Int[Array, ""], noise: Noise | None = None) -> "Decoding":
        """The text with one more token."""
        context = transformer.context
        start, next_start = window_start(self.length, context), window_start(self.length + 1, context)

        def restart() -> Decoding:
            kept = self.tokens[window_step(context) :]
            return self._of_window(transformer, jnp.append(kept, token), next_start, noise)

        def extend() -> Decoding:
            position = self.length - start
            tokens = self.tokens.at[position].set(token)
            embedding = lax.dynamic_slice_in_dim(transformer.embed(tokens), position, 1)
            if noise is not None:
                embedding = embedding + noise(self.length[None])
            logits, cache = self.cache.read(transformer, embedding, position)
            return Decoding(tokens, self.length + 1, cache, logits)

        return lax.cond(next_start > start, restart, extend)


@eqx.filter_jit
def _last_logits(transformer: Transformer, tokens: Int[Array, " r"]) -> Float[Array, " V"]:
    return transformer(tokens)[-1]


def next_token_logits(transformer: Transformer, tokens: Int[Array, " m"]) -> Float[Array, " V"]:
    """Logits (V,) of the token that follows m tokens, by one pass over the window that the module docstring defines.

    Raises ValueError for no tokens, for tokens that are not integers or out of range, and for a transformer whose
    weights have a leading axis, which belongs under jax.vmap.
    """
    tokens = require_text("tokens", tokens, transformer)
    return _last_logits(transformer, tokens[window_start(tokens.shape[0], transformer.context) :])


def require_text(name: str, tokens: Any, transformer: Transformer) -> Int[Array, " m"]:
    """The tokens as an integer array (m,) of at least one, all of them in the vocabulary of the transformer."""
    if not isinstance(transformer, Transformer):
        raise ValueError(f"transformer: got {type(transformer).__name__}; pass a Transformer.")
    if transformer.token_embedding is None:
        raise ValueError(
            "transformer: has no embedding of tokens, for it was drawn with latents from the process; pass one with "
            "latents in a table, or draw texts by transformer_model with a length."
        )
    if transformer.token_embedding.ndim != 2:
        raise ValueError(
            f"transformer: its token embedding has shape {transformer.token_embedding.shape} instead of (V, d); pass "
            "one transformer, or call under jax.vmap for weights with a leading axis."
        )
    given = require_integers(name, tokens)
    if given.ndim != 1 or given.size == 0:
        raise ValueError(f"{name}: has shape {given.shape}; pass one text (m,) of at least one token.")
    require_vocabulary(name, given, transformer.token_embedding.shape[0])
    return given.astype(jnp.int32)
