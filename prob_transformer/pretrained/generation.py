"""Text from a pretrained decoder: tokens drawn one after the other, with keys and values kept.

    x_{m+1} ~ softmax(logits_m / temperature), among the top_k largest logits

The rule of drawing is that of prob_transformer/transformer/generation.py. A text ends at the model's context, because a
pretrained decoder has no rule for what comes after it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from prob_transformer._validation import require_count, require_key
from prob_transformer.pretrained.decoder import Decoder, Kept
from prob_transformer.transformer.generation import Rule, Sampled, require_finite_log_probs


class _Texts(NamedTuple):
    """B texts of one length: the keys and values of every layer, the length, and the logits of the next token."""

    kept: tuple[Kept, ...]
    length: Int[Array, ""]
    logits: Float[Array, "B V"]

    @classmethod
    def empty(cls, decoder: Decoder, count: int, room: int) -> "_Texts":
        kept = tuple(block.nothing_kept(count, room) for block in decoder.blocks)
        return cls(kept, jnp.asarray(0), jnp.zeros((count, decoder.head.shape[0]), decoder.head.dtype))

    def append(self, decoder: Decoder, tokens: Int[Array, "B r"]) -> "_Texts":
        """The texts with r more tokens each."""
        stream, found = decoder.token_embedding[tokens], []
        if decoder.position_embedding is not None:
            stream = stream + lax.dynamic_slice_in_dim(decoder.position_embedding, self.length, tokens.shape[1])
        for block, kept in zip(decoder.blocks, self.kept, strict=True):
            stream, kept = jax.vmap(block.read, in_axes=(0, 0, None))(stream, kept, self.length)
            found.append(kept)
        return _Texts(tuple(found), self.length + tokens.shape[1], _last_logits(decoder, stream))


@eqx.filter_jit
def _last_logits(decoder: Decoder, stream: Float[Array, "B r d"]) -> Float[Array, "B V"]:
    return decoder.logits(stream[:, -1])


@eqx.filter_jit
def _next(rule: Rule, keys: PRNGKeyArray, length: Int[Array, ""], logits: Float[Array, "B V"]) -> Sampled:
    return jax.vmap(rule.next, in_axes=(0, None, 0))(keys, length, logits)


def continue_texts(
    decoder: Decoder,
    prompts: Int[np.ndarray, "B m"],
    length: int,
    *,
    keys: PRNGKeyArray,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Iterator[Sampled]:
    """An iterator over the next `length` tokens (B,) of B texts, with log-probabilities (B,) in nats at temperature 1.

    `keys` (B,): one for each text, whose tokens do not depend on the other texts. Temperature 0 takes the most probable
    token; `top_k` draws among the k most probable ones. Raises ValueError at the call for prompts that do not fit the
    decoder, keys that are not one for each, length < 1, prompts and new tokens that do not fit the context together,
    temperature < 0, and top_k outside 1..V; on the way for log-probabilities that are not finite.
    """
    prompts = np.asarray(prompts)
    if prompts.ndim != 2 or prompts.shape[0] == 0:
        raise ValueError(f"prompts: has shape {prompts.shape}; pass texts of one length (B, m), one of them as (1, m).")
    count, given = prompts.shape
    require_key("keys", keys, (count,))
    if given >= decoder.context:
        raise ValueError(
            f"prompts: got {given} tokens, but a context of {decoder.context} with room for a token after them takes "
            f"at most {decoder.context - 1}; pass shorter ones."
        )
    for prompt in prompts:
        decoder.embed(prompt)
    require_count("length", length, 1, "the number of tokens to generate")
    if given + length > decoder.context:
        raise ValueError(
            f"length: got {length}, but a context of {decoder.context} has room for {decoder.context - given} tokens "
            f"after a prompt of {given}; pass a smaller length or a shorter prompt."
        )
    rule = Rule.checked(temperature, top_k, 0.0, decoder.token_embedding.shape[0])
    # As `generate` of a Transformer splits its key.
    keys = jax.vmap(lambda key: jax.random.split(key)[0])(keys)

    def steps() -> Iterator[Sampled]:
        texts = _Texts.empty(decoder, count, given + length).append(decoder, jnp.asarray(prompts, jnp.int32))
        for left in reversed(range(length)):
            drawn = _next(rule, keys, texts.length, texts.logits)
            if left:
                # Before the check, which waits for what is drawn.
                texts = texts.append(decoder, drawn.tokens[:, None])
            require_finite_log_probs("decoder", drawn.log_probs)
            yield drawn

    return steps()
