"""What a trained model is perturbed by, and its loss then: none of it is trained on or chosen by.

A window holds the n characters a model reads and what came next in the original text, which stays the target. With
input embeddings u (n, d), and g the gradient in u of the window's loss:

    embedding-noise           u + level * z,  z standard normal
    relative-embedding-noise  u + level * r_0 * z,  r_l the root mean square of the input stream of layer l
    layer-noise               level * r_l * z_l added to the input stream of every layer l
    substitution              each character, with probability level, another one of the vocabulary, not the unknown
    swap                      each pair of neighbours exchanged with probability level; pairs are disjoint
    deletion                  each character left out with probability level, later ones moving up until n are there
    adversarial               u + level * ||u|| * g / ||g||,  norms over the window

Of a swapped pair the first place shows the very character that is to be predicted there; nothing tells the model so.
What is drawn depends on the kind and the window's number alone: every model and every level meets the same draws, so
losses are compared pairwise, and a larger level changes every character that a smaller one does.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from models.char_gpt.model import CharGPT, Tap
from models.char_gpt.penalty import cross_entropy

LEVELS: dict[str, tuple[float, ...]] = {
    "embedding-noise": (0.05, 0.1, 0.2, 0.4, 0.8),
    "relative-embedding-noise": (0.25, 0.5, 1.0, 1.5, 2.0),
    "layer-noise": (0.05, 0.1, 0.2, 0.4),
    "substitution": (0.02, 0.05, 0.1),
    "deletion": (0.02, 0.05, 0.1),
    "swap": (0.02, 0.05, 0.1),
    "adversarial": (0.02, 0.05, 0.1, 0.2),
}
NOISE_SEED = 20_260_222
_CHUNK = 32

_AtLevel = Callable[[Float[Array, ""]], Float[Array, ""]]


def spare_characters(context: int) -> int:
    """How many characters a window must have beyond the context and its last target, for deletion to move up."""
    # At the largest level 0.1 and 64 positions, 20: over four standard deviations more than the mean of 7.
    return context // 4 + 4


def substituted(
    key: PRNGKeyArray, characters: Int[Array, " n"], share: Float[Array, ""], vocabulary_size: int
) -> Int[Array, " n"]:
    """Each character, with probability `share`, replaced by another that is not 0, the unknown, all equally likely."""
    where, which = jax.random.split(key)
    # Numbers from 1 that leave out the original: those from it on move up by one.
    choices = vocabulary_size - 1 - (characters > 0)
    drawn = 1 + jax.random.randint(which, characters.shape, 0, choices, jnp.int32)
    other = drawn + ((characters > 0) & (drawn >= characters))
    chosen = jax.random.uniform(where, characters.shape, jnp.float32) < share
    return jnp.where(chosen, other, characters).astype(characters.dtype)


def swapped(key: PRNGKeyArray, characters: Int[Array, " n"], share: Float[Array, ""]) -> Int[Array, " n"]:
    """Pairs of neighbours, which begin at 0 or at 1 and then follow each other, exchanged with probability `share`."""
    first, which = jax.random.split(key)
    length = len(characters)
    place = jnp.arange(length)
    number = place + jax.random.bernoulli(first).astype(place.dtype)
    partner = jnp.where(number % 2 == 0, place + 1, place - 1)
    chosen = jax.random.uniform(which, (length // 2 + 1,), jnp.float32)[number // 2] < share
    return characters[jnp.where(chosen & (partner >= 0) & (partner < length), partner, place)]


def kept_positions(key: PRNGKeyArray, length: int, kept: int, share: Float[Array, ""]) -> Int[Array, " kept"]:
    """The first `kept` of `length` positions after each was left out with probability `share`, in order.

    Once length - kept are left out, no more are.
    """
    left_out = jax.random.uniform(key, (length,), jnp.float32) < share
    left_out = left_out & (jnp.cumsum(left_out) <= length - kept)
    return jnp.argsort(left_out, stable=True)[:kept]


def loss_gradient(model: CharGPT, embeddings: Float[Array, "n d"], targets: Int[Array, " n"]) -> Float[Array, "n d"]:
    """Gradient of the mean cross-entropy of a window, in nats, in its input embeddings."""
    return jax.grad(lambda u: _loss(model, u, targets))(embeddings)


def _unit(direction: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """The direction with norm 1; a direction of zeros, where no step changes anything, stays zeros."""
    largest = jnp.abs(direction).max()
    scaled = direction / jnp.where(largest > 0, largest, 1)
    norm = jnp.linalg.norm(scaled)
    return scaled / jnp.where(norm > 0, norm, 1)


def _loss(model: CharGPT, embeddings: Array, targets: Array, tap: Tap | None = None) -> Float[Array, ""]:
    logits, _ = model.decode(embeddings) if tap is None else model.decode(embeddings, tap=tap)
    return cross_entropy(logits, targets).mean()


# Each takes a model, a window, its key and the RMS of the streams, and gives the loss as a function of the level.


def _embedding_noise(model: CharGPT, window: Array, key: PRNGKeyArray, rms: Array) -> _AtLevel:
    n = model.context
    embeddings = model.embed(window[:n])
    noise = jax.random.normal(key, embeddings.shape, jnp.float32)
    return lambda level: _loss(model, embeddings + level * noise, window[1 : n + 1])


def _layer_noise(model: CharGPT, window: Array, key: PRNGKeyArray, rms: Array) -> _AtLevel:
    n = model.context
    embeddings = model.embed(window[:n])
    noise = rms[:, None, None] * jax.random.normal(key, (len(model.blocks), *embeddings.shape), jnp.float32)

    def at(level: Array) -> Array:
        def tap(name: str, inputs: Array, outputs: Array) -> Array:
            layer, _, own = name.partition(".")
            return outputs + level * noise[int(layer)] if own == "stream" else outputs

        return _loss(model, embeddings, window[1 : n + 1], tap)

    return at


def _substitution(model: CharGPT, window: Array, key: PRNGKeyArray, rms: Array) -> _AtLevel:
    n, size = model.context, model.token_embedding.shape[0]
    return lambda level: _loss(model, model.embed(substituted(key, window[:n], level, size)), window[1 : n + 1])


def _swap(model: CharGPT, window: Array, key: PRNGKeyArray, rms: Array) -> _AtLevel:
    n = model.context
    return lambda level: _loss(model, model.embed(swapped(key, window[:n], level)), window[1 : n + 1])


def _deletion(model: CharGPT, window: Array, key: PRNGKeyArray, rms: Array) -> _AtLevel:
    n = model.context

    def at(level: Array) -> Array:
        kept = kept_positions(key, n + spare_characters(n), n, level)
        return _loss(model, model.embed(window[kept]), window[kept + 1])

    return at


def _adversarial(model: CharGPT, window: Array, key: PRNGKeyArray, rms: Array) -> _AtLevel:
    n = model.context
    embeddings, targets = model.embed(window[:n]), window[1 : n + 1]
    step = jnp.linalg.norm(embeddings) * _unit(loss_gradient(model, embeddings, targets))
    return lambda level: _loss(model, embeddings + level * step, targets)


_KINDS = {
    "embedding-noise": _embedding_noise,
    "relative-embedding-noise": _embedding_noise,
    "layer-noise": _layer_noise,
    "substitution": _substitution,
    "swap": _swap,
    "deletion": _deletion,
    "adversarial": _adversarial,
}
# Fixed by name, so that a kind added later leaves the draws of the others as they are; both noises share theirs.
_STREAM_OF_DRAWS = {_embedding_noise: 0, _layer_noise: 1, _substitution: 2, _swap: 3, _deletion: 4, _adversarial: 5}


# Compiled once for a kind and a number of levels, whatever the levels are.
@eqx.filter_jit
def _chunk_losses(
    perturbation: Callable[..., _AtLevel], model: CharGPT, windows: Array, numbers: Array, levels: Array, rms: Array
) -> Float[Array, "K B"]:
    key = jax.random.fold_in(jax.random.key(NOISE_SEED), _STREAM_OF_DRAWS[perturbation])

    def one_window(window: Array, number: Array) -> Array:
        at = perturbation(model, window, jax.random.fold_in(key, number), rms)
        return jax.lax.map(at, levels)

    return jax.vmap(one_window, out_axes=1)(windows, numbers)


@eqx.filter_jit
def _chunk_squares(model: CharGPT, windows: Array) -> Float[Array, "B L"]:
    def one_window(characters: Array) -> Array:
        squares: list[Array] = []

        def tap(name: str, inputs: Array, outputs: Array) -> Array:
            if name.endswith(".stream"):
                squares.append(jnp.square(inputs).mean())
            return outputs

        model.decode(model.embed(characters), tap=tap)
        return jnp.stack(squares)

    return jax.vmap(one_window)(windows[:, : model.context])


def _by_chunks(function: Callable[[Array, Array], Array], windows: Int[np.ndarray, "W m"]) -> list[np.ndarray]:
    """`function(windows, their numbers)` for equal parts of the windows, the last filled up with its last window."""
    parts = []
    for start in range(0, len(windows), _CHUNK):
        numbers = np.minimum(np.arange(start, start + _CHUNK, dtype=np.int32), len(windows) - 1)
        parts.append(np.asarray(function(jnp.asarray(windows[numbers]), jnp.asarray(numbers)), np.float64))
    return parts


def stream_rms(model: CharGPT, windows: Int[np.ndarray, "W m"]) -> Float[np.ndarray, " L"]:
    """Root mean square of every layer's input stream over clean windows; the first is that of the embeddings."""
    squares = np.concatenate(_by_chunks(lambda chunk, _: _chunk_squares(model, chunk), windows))
    return np.sqrt(squares[: len(windows)].mean(0))


def perturbed_losses(
    model: CharGPT,
    windows: Int[np.ndarray, "W m"],
    kind: str,
    levels: tuple[float, ...],
    rms: Float[np.ndarray, " L"],
) -> Float[np.ndarray, "K W"]:
    """Nats per character of every window at every level of a kind of `LEVELS`, `rms` being that of `stream_rms`.

    Windows need m >= n + 1 characters, and `spare_characters(n)` more for deletion. Raises ValueError for less, for
    an unknown kind, and for substitution in a vocabulary of fewer than two characters beside the unknown.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind: got {kind!r}; pass one of {', '.join(_KINDS)}.")
    needed = model.context + 1 + (spare_characters(model.context) if kind == "deletion" else 0)
    if windows.shape[1] < needed:
        raise ValueError(f"windows: hold {windows.shape[1]} characters; pass at least {needed} for {kind}.")
    if kind == "substitution" and model.token_embedding.shape[0] < 3:
        raise ValueError("model: has a vocabulary with no second character to substitute; pass a text that has one.")
    unit = rms[0] if kind == "relative-embedding-noise" else 1.0
    scaled, streams = jnp.asarray(np.asarray(levels) * unit, jnp.float32), jnp.asarray(rms, jnp.float32)

    def losses(chunk: Array, numbers: Array) -> Array:
        return _chunk_losses(_KINDS[kind], model, chunk[:, :needed], numbers, scaled, streams)

    return np.concatenate(_by_chunks(losses, windows), axis=1)[:, : len(windows)]


def clean_losses(model: CharGPT, windows: Int[np.ndarray, "W m"]) -> Float[np.ndarray, " W"]:
    """Nats per character of every window as it is."""
    return perturbed_losses(model, windows, "embedding-noise", (0.0,), np.ones(len(model.blocks)))[0]
