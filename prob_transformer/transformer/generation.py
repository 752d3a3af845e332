"""Text from a transformer: tokens drawn one after the other, with the margins of the positions they were read from.

    x_{m+1} ~ softmax(logits_m / temperature), among the top_k largest logits          `sample`, `generate`, `stream`

logits_m are those of the window after m tokens (decoding.py). With noise, the input embedding of token t is
u_t + noise_scale * eps_t with eps_t ~ N(0, I), drawn once for each token and kept as the window moves.

Margins of a generated position are those of the position that was read to predict it, the last one of the window: of
every layer and head, det J and sigma_min(J) for J = I - Cov_alpha(u, k) W_Q / sqrt(p), where u are the layer's
normalised inputs, alpha the softmax over the strict past, values the identity, each head alone (theory sections 2, 4
and 8). They are computed for whole windows after the tokens are drawn, and do not change them.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PRNGKeyArray

from prob_transformer._validation import require_count, require_finite, require_key
from prob_transformer.transformer.decoding import Decoding, Noise, require_text, window_number, window_start
from prob_transformer.transformer.network import Transformer
from prob_transformer.transformer.window_margins import margins_of_steps


class Sampled(NamedTuple):
    """N tokens, and their log-probabilities in nats under the model at temperature 1, both (N,)."""

    tokens: Int[Array, " N"]
    log_probs: Float[Array, " N"]


class Generated(NamedTuple):
    """N generated tokens, and the margins of the positions they were predicted from; None where not asked for.

    `tokens` (N,); `log_probs` (N,) in nats, under the model at temperature 1 and without top_k; `sign` and `log_det`
    (L, H, N), of det J in nats; `conditioning` (L, H, N), sigma_min(J). A position without a past has J = I.
    """

    tokens: Int[Array, " N"]
    log_probs: Float[Array, " N"]
    sign: Float[Array, "L H N"] | None
    log_det: Float[Array, "L H N"] | None
    conditioning: Float[Array, "L H N"] | None


class Rule(eqx.Module):
    """How tokens are drawn: temperature None takes the largest logit, noise_scale None adds no noise."""

    temperature: Float[Array, ""] | None
    noise_scale: Float[Array, ""] | None
    top_k: int | None = eqx.field(static=True)

    @classmethod
    def of(cls, temperature: Any, top_k: int | None, noise_scale: Any) -> "Rule":
        def unless_zero(value: Any) -> Array | None:
            return None if not isinstance(value, Tracer) and not np.asarray(value).any() else jnp.asarray(value)

        return cls(unless_zero(temperature), unless_zero(noise_scale), top_k)

    @classmethod
    def checked(cls, temperature: Any, top_k: int | None, noise_scale: Any, vocabulary: int) -> "Rule":
        """The rule. Raises ValueError for temperature < 0, noise_scale < 0, and top_k outside 1..`vocabulary`."""
        for name, value in (("temperature", temperature), ("noise_scale", noise_scale)):
            number = require_finite(name, value)
            if number.ndim or (not isinstance(value, Tracer) and float(np.asarray(value)) < 0):
                raise ValueError(f"{name}: got {value}; pass one number of at least 0.")
        if top_k is not None:
            require_count("top_k", top_k, 1, "the number of most probable tokens to draw from")
            if top_k > vocabulary:
                raise ValueError(f"top_k: got {top_k}; pass at most {vocabulary}, the size of the vocabulary.")
            top_k = int(top_k)
        return cls.of(temperature, top_k, noise_scale)

    def noise(self, transformer: Transformer, key: PRNGKeyArray) -> Noise | None:
        """Noise that depends on the key and the number of the token alone, and so neither on windows nor on chunks."""
        if self.noise_scale is None:
            return None
        width, dtype = transformer.token_embedding.shape[1], transformer.token_embedding.dtype
        scale = self.noise_scale.astype(dtype)

        def of_token(number: Int[Array, ""]) -> Float[Array, " d"]:
            return scale * jax.random.normal(jax.random.fold_in(key, number), (width,), dtype)

        return jax.vmap(of_token)

    def draw(self, key: PRNGKeyArray, logits: Float[Array, " V"]) -> Int[Array, ""]:
        """One token."""
        if self.temperature is None:
            return jnp.argmax(logits).astype(jnp.int32)
        # Draws compare the logits with noise of their type: half precision has too few values for that.
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        # Relative to the largest first, whose quotient by a tiny temperature would not be finite.
        # A temperature that the processor counts as 0 would make 0 / 0 of the largest: the smallest normal one has all
        # weight on the largest as well.
        temperature = jnp.maximum(self.temperature.astype(logits.dtype), jnp.finfo(logits.dtype).tiny)
        logits = (logits - logits.max()) / temperature
        if self.top_k is None:
            return jax.random.categorical(key, logits).astype(jnp.int32)
        largest, tokens = lax.top_k(logits, self.top_k)
        return tokens[jax.random.categorical(key, largest)]

    def next(self, key: PRNGKeyArray, count: Int[Array, ""], logits: Float[Array, " V"]) -> Sampled:
        """The token after `count` others, () and (), whose draw depends on the key and on that number alone."""
        token = self.draw(jax.random.fold_in(key, count), logits)
        return Sampled(token, jax.nn.log_softmax(logits)[token])


def require_finite_log_probs(name: str, log_probs: Float[Array, "..."]) -> None:
    """Raises ValueError if log-probabilities of drawn tokens are not finite; those of a trace pass."""
    if not isinstance(log_probs, Tracer) and not np.isfinite(np.asarray(log_probs, np.float32)).all():
        raise ValueError(
            f"{name}: gives drawn tokens log-probabilities that are not finite; pass finite weights, and less noise if "
            "there is any."
        )


def _require_numbers(found: Generated) -> Generated:
    require_finite_log_probs("transformer", found.log_probs)
    for name in ("log_det", "conditioning"):
        values = getattr(found, name)
        if values is not None and not isinstance(values, Tracer) and np.isnan(np.asarray(values, np.float32)).any():
            raise ValueError(
                f"transformer: {name} of some margin is not a number in {values.dtype}; pass weights that are finite "
                "and neither too large nor too small for it, or margins=False."
            )
    return found


def _drawn(
    transformer: Transformer, text: Decoding, key: PRNGKeyArray, length: int, rule: Rule
) -> tuple[Decoding, Sampled]:
    """The text with `length` more tokens, and those tokens."""
    draw_key, noise_key = jax.random.split(key)
    noise = rule.noise(transformer, noise_key)

    def step(text: Decoding, _: None) -> tuple[Decoding, Sampled]:
        drawn = rule.next(draw_key, text.length, text.logits)
        return text.append(transformer, drawn.tokens, noise), drawn

    return lax.scan(step, text, None, length)


def _begun(transformer: Transformer, prompt: Int[Array, " m"], key: PRNGKeyArray, rule: Rule) -> Decoding:
    return Decoding.of(transformer, prompt, rule.noise(transformer, jax.random.split(key)[1]))


def sample(
    transformer: Transformer,
    prompt: Int[Array, " m"],
    key: PRNGKeyArray,
    length: int,
    *,
    temperature: Float[Array, ""] | float = 1.0,
    top_k: int | None = None,
    noise_scale: Float[Array, ""] | float = 0.0,
) -> Sampled:
    """The tokens of `generate` and their log-probabilities, without margins and without checks.

    Pure JAX, for use under jit and vmap: m, `length` and `top_k` are static, and so is whether a temperature is 0.
    """
    rule = Rule.of(temperature, top_k, noise_scale)
    return _drawn(transformer, _begun(transformer, prompt, key, rule), key, length, rule)[1]


def _with_margins(
    transformer: Transformer, text: Decoding, key: PRNGKeyArray, length: int, windows: int, rule: Rule, margins: bool
) -> tuple[Decoding, Generated]:
    after, sampled = _drawn(transformer, text, key, length, rule)
    if not margins:
        return after, Generated(*sampled, None, None, None)
    noise = rule.noise(transformer, jax.random.split(key)[1])
    found = margins_of_steps(transformer, text, sampled.tokens, windows, noise)
    return after, Generated(*sampled, *found)


@eqx.filter_jit
def _generated(
    transformer: Transformer, prompt: Int[Array, " m"], key: PRNGKeyArray, length: int, rule: Rule, margins: bool
) -> Generated:
    context = transformer.context
    count = prompt.shape[0] - window_start(prompt.shape[0], context)
    windows = window_number(count + length - 1, context) + 1
    text = _begun(transformer, prompt, key, rule)
    return _with_margins(transformer, text, key, length, windows, rule, margins)[1]


def generate(
    transformer: Transformer,
    prompt: Int[Array, " m"],
    length: int,
    *,
    key: PRNGKeyArray,
    temperature: float = 1.0,
    top_k: int | None = None,
    noise_scale: float = 0.0,
    margins: bool = True,
) -> Generated:
    """`length` tokens after a prompt (m,), with their log-probabilities and margins; one compiled scan with a cache.

    Temperature 0 takes the most probable token; `top_k` draws among the k most probable ones. `noise_scale` is the
    standard deviation of noise on every input embedding, that of the prompt's tokens too. A text longer than the
    context is read in the windows of decoding.py. The function works under jax.vmap over transformers (draws of the
    weights), prompts and keys. Raises ValueError for a prompt that is empty, not of integers or out of the vocabulary,
    length < 1, temperature < 0, noise_scale < 0, top_k outside 1..V, and, where it is not traced, log-probabilities or
    margins that are no numbers. Equations: the module docstring.
    """
    prompt, rule = _checked(transformer, prompt, key, length, temperature, top_k, noise_scale)
    return _require_numbers(_generated(transformer, prompt, key, int(length), rule, margins))


_compiled_begun = eqx.filter_jit(_begun)
_compiled_chunk = eqx.filter_jit(_with_margins)


def stream(
    transformer: Transformer,
    prompt: Int[Array, " m"],
    length: int,
    *,
    key: PRNGKeyArray,
    chunk: int = 32,
    temperature: float = 1.0,
    top_k: int | None = None,
    noise_scale: float = 0.0,
    margins: bool = True,
) -> Iterator[Generated]:
    """An iterator over what `generate` returns for the same key, `chunk` tokens at a time, each as soon as it is drawn.

    Tokens are the same whatever the chunk; log-probabilities and margins are so up to rounding. Raises ValueError at
    the call as `generate`, and for chunk < 1; on the way for log-probabilities and margins that are no numbers.
    """
    prompt, rule = _checked(transformer, prompt, key, length, temperature, top_k, noise_scale)
    require_count("chunk", chunk, 1, "the number of tokens that come at a time")
    chunk = min(int(chunk), int(length))
    # A window that is full already leaves the most windows to a chunk.
    windows = window_number(transformer.context + chunk - 1, transformer.context) + 1

    def chunks() -> Iterator[Generated]:
        text = _compiled_begun(transformer, prompt, key, rule)
        for drawn in range(0, length, chunk):
            text, found = _compiled_chunk(transformer, text, key, chunk, windows, rule, margins)
            # The last chunk is drawn whole, so that one compiled function serves all.
            yield _require_numbers(jax.tree.map(lambda x, left=length - drawn: x[..., :left], found))

    return chunks()


def _checked(
    transformer: Transformer,
    prompt: Any,
    key: Any,
    length: Any,
    temperature: Any,
    top_k: int | None,
    noise_scale: Any,
) -> tuple[Int[Array, " m"], Rule]:
    prompt = require_text("prompt", prompt, transformer)
    require_key("key", key)
    require_count("length", length, 1, "the number of tokens to generate")
    return prompt, Rule.checked(temperature, top_k, noise_scale, transformer.token_embedding.shape[0])
