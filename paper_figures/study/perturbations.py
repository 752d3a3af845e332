"""What a run of the study is measured by: its loss, clean and under perturbations, and its margins.

None of the perturbations is trained on or chosen by: strengths are chosen on clean validation loss, and validation text is
not perturbed. Margins and the root mean square of the streams, which some noise is measured in, are of validation windows.

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
What is drawn is common to all models and levels (models/char_gpt/evaluation.py), and a larger level changes every
character that a smaller one does.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from models.char_gpt.config import SITES, Config
from models.char_gpt.evaluation import (
    EMBEDDING_NOISE,
    RELATIVE_EMBEDDING_NOISE,
    AtLevel,
    Perturbation,
    clean_losses,
    clean_summary,
    compiled_forward,
    determinants_at,
    evaluation_windows,
    finite,
    loss_at,
    margins,
    perturbed_rows,
    stream_rms,
)
from models.corpus import Corpus
from prob_transformer.transformer.network import Transformer

_PASSAGE_WINDOWS = 3
# A second corpus needs no more precision than its standard error over windows gives, and half of the time is saved.
_NEWS_SHARE = 0.5


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


def _unit(direction: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """The direction with norm 1; a direction of zeros, where no step changes anything, stays zeros."""
    largest = jnp.abs(direction).max()
    scaled = direction / jnp.where(largest > 0, largest, 1)
    norm = jnp.linalg.norm(scaled)
    return scaled / jnp.where(norm > 0, norm, 1)


# Each takes a model, a window, its key and the RMS of the streams, and gives the loss as a function of the level.


def _layer_noise(model: Transformer, window: Array, key: PRNGKeyArray, rms: Array) -> AtLevel:
    n = model.context
    embeddings = model.embed(window[:n])
    noise = rms[:, None, None] * jax.random.normal(key, (len(model.blocks), *embeddings.shape), jnp.float32)

    def at(level: Array) -> Array:
        def hook(name: str, inputs: Array, outputs: Array) -> Array:
            layer, _, own = name.partition(".")
            return outputs + level * noise[int(layer)] if own == "stream" else outputs

        return loss_at(model, embeddings, window[1 : n + 1], hook=hook)

    return at


def _substitution(model: Transformer, window: Array, key: PRNGKeyArray, rms: Array) -> AtLevel:
    n, size = model.context, model.token_embedding.shape[0]
    if size < 3:
        raise ValueError("model: has a vocabulary with no second character to substitute; pass a text that has one.")
    return lambda level: loss_at(model, model.embed(substituted(key, window[:n], level, size)), window[1 : n + 1])


def _swap(model: Transformer, window: Array, key: PRNGKeyArray, rms: Array) -> AtLevel:
    n = model.context
    return lambda level: loss_at(model, model.embed(swapped(key, window[:n], level)), window[1 : n + 1])


def _deletion(model: Transformer, window: Array, key: PRNGKeyArray, rms: Array) -> AtLevel:
    n = model.context
    length = n + spare_characters(n)
    if len(window) <= length:
        raise ValueError(f"windows: hold {len(window)} characters; pass at least {length + 1} for deletion.")

    def at(level: Array) -> Array:
        kept = kept_positions(key, length, n, level)
        return loss_at(model, model.embed(window[kept]), window[kept + 1])

    return at


def _adversarial(model: Transformer, window: Array, key: PRNGKeyArray, rms: Array) -> AtLevel:
    n = model.context
    embeddings, targets = model.embed(window[:n]), window[1 : n + 1]
    slope = jax.grad(lambda u: loss_at(model, u, targets))(embeddings)
    step = jnp.linalg.norm(embeddings) * _unit(slope)
    return lambda level: loss_at(model, embeddings + level * step, targets)


KINDS = {
    "embedding-noise": EMBEDDING_NOISE,
    "relative-embedding-noise": RELATIVE_EMBEDDING_NOISE,
    "layer-noise": Perturbation(_layer_noise, 1, (0.05, 0.1, 0.2, 0.4)),
    "substitution": Perturbation(_substitution, 2, (0.02, 0.05, 0.1)),
    "deletion": Perturbation(_deletion, 4, (0.02, 0.05, 0.1)),
    "swap": Perturbation(_swap, 3, (0.02, 0.05, 0.1)),
    "adversarial": Perturbation(_adversarial, 5, (0.02, 0.05, 0.1, 0.2)),
}


def measured(model: Transformer, corpus: Corpus, config: Config, *, with_passage: bool) -> dict[str, Any]:
    """The "embedding_rms", "splits", "margins" and "passage" of a run, ready for JSON.

    Clean loss on validation, test and, where the corpus has them, news windows; loss under every perturbation on the
    latter two. "passage" is None unless asked for.
    """
    windows = evaluation_windows(corpus.validation, config)
    rms = stream_rms(model, windows)
    parts: dict[str, tuple[np.ndarray, dict[str, Perturbation]]] = {"validation": (windows, {})}
    for split, characters, share in (("test", corpus.test, 1.0), ("news", corpus.news, _NEWS_SHARE)):
        if characters is not None:
            spare = spare_characters(config.context)
            parts[split] = evaluation_windows(characters, config, spare, share), KINDS
    splits = {}
    for split, (chosen, kinds) in parts.items():
        clean = clean_losses(model, chosen)
        splits[split] = {
            "name": corpus.name_of(split),
            "clean": clean_summary(clean, config),
            "perturbed": perturbed_rows(model, chosen, clean, rms, kinds),
        }
    return {
        "embedding_rms": float(rms[0]),
        "splits": splits,
        "margins": margins(model, windows)[0],
        "passage": passage(model, corpus, config) if with_passage else None,
    }


def passage(model: Transformer, corpus: Corpus, config: Config) -> dict[str, Any]:
    """How the validation text begins, with its margins, window by window; ready for JSON.

    det J of every character at the embedding site, and of every layer the smallest over its heads; None for the first
    two characters of a window, where it is 1 by definition, and where it is not finite.
    """
    count = min(_PASSAGE_WINDOWS, len(corpus.validation) // config.context)
    windows = corpus.validation[: count * config.context].reshape(count, config.context)
    _, embeddings, (inputs, _, _) = compiled_forward(model, jnp.asarray(windows))
    embedding, layers = (determinants_at(model, site, embeddings, inputs)[0] for site in SITES)
    for found in (embedding, layers):
        found[..., :2] = np.nan
    return {
        "text": corpus.vocabulary.decode(windows.ravel()),
        "margins": [finite(layer.min(0).ravel()) for layer in layers],
        "embedding": finite(embedding.ravel()),
    }
