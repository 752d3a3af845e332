"""Figures of every token of a passage: how close its heads are to the boundary, and how the model behaves there.

Margins, over all layers and heads, of the map e = u - mu(u) at the layers' normalised inputs, identity values:

    closest      largest barrier -log|det J_i|, in nats        mean         mean barrier
    negative     share of heads with det J_i < 0

each for the strict past and with the position itself included. Behaviour, in nats:

    loss         -log p(x_{i+1} | x_<=i)
    change       KL(p || p~), mean over draws of Gaussian noise on all embeddings, relative to their root mean square

Baselines: entropy, of the attention weights that the model computes, mean over layers and heads; log position; and past
share, the mean of log(1 - alpha_ii) with alpha_ii the weight of a position on itself. The last is no geometry, but d
times it is a term of log|det J_i| with the position included (prob_transformer/self_inclusion.py).
"""

from collections.abc import Iterable, Iterator
from itertools import islice, zip_longest
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from models import wikipedia
from prob_transformer import Attention, layer_margins
from prob_transformer.files import read_user_text
from prob_transformer.pretrained.decoder import Decoder, attention_logits

READINGS = ("strict", "inclusive")
MARGINS = tuple(f"{reading} {figure}" for reading in READINGS for figure in ("closest", "mean", "negative"))
OUTCOMES = ("loss", "change")
BASELINES = ("entropy", "log position")
PAST_SHARE = "past share"
# Positions with less past than this are left out: their margins say more of where they stand than of the text.
SHORTEST_PAST = 8


class Passage(NamedTuple):
    """Figures by name, each of the m tokens kept, and share of negative signs by reading, layer and head."""

    figures: dict[str, Float[np.ndarray, " m"]]
    negative: dict[str, Float[np.ndarray, "L H"]]


@jax.jit
def attention(layer: Attention, inputs: Float[Array, "n d"]) -> tuple[Float[Array, "H n"], Float[Array, "H n"]]:
    """Entropy of the weights in nats, as the model computes them, and log(1 - alpha_ii), -inf at the first position."""
    logs = jax.nn.log_softmax(attention_logits(layer, inputs), axis=-1)
    visible = logs > -jnp.inf
    entropy = -jnp.where(visible, jnp.exp(logs) * jnp.where(visible, logs, 0), 0).sum(-1)
    # Not log(1 - alpha_ii), which has no digits left where a position attends to itself alone.
    return entropy, jax.nn.logsumexp(logs, axis=-1, where=~jnp.eye(logs.shape[-1], dtype=bool))


@jax.jit
def token_losses(logits: Float[Array, "n V"], tokens: Int[Array, " n"]) -> Float[Array, " m"]:
    """-log p(x_{i+1} | x_<=i) in nats of every token but the first."""
    logs = jax.nn.log_softmax(logits[:-1], axis=-1)
    return -jnp.take_along_axis(logs, tokens[1:, None], 1)[:, 0]


@jax.jit
def _divergence(logits: Float[Array, "n V"], changed: Float[Array, "n V"]) -> Float[Array, " n"]:
    logs = jax.nn.log_softmax(logits, axis=-1)
    return (jnp.exp(logs) * (logs - jax.nn.log_softmax(changed, axis=-1))).sum(-1)


def logit_change(
    decoder: Decoder,
    tokens: Int[np.ndarray, " n"],
    logits: Float[Array, "n V"],
    noise: float,
    draws: int,
    key: PRNGKeyArray,
) -> Float[np.ndarray, " n"]:
    """Mean KL divergence in nats of the next-token law, by its logits, from the one under embedding noise."""
    embeddings = decoder.embed(tokens)
    size = noise * jnp.sqrt(jnp.square(embeddings).mean())
    total = jnp.zeros(tokens.shape[0], logits.dtype)
    for draw in jax.random.split(key, draws):
        disturbed = embeddings + size * jax.random.normal(draw, embeddings.shape, embeddings.dtype)
        total += _divergence(logits, decoder.logits_from(disturbed))
    return np.asarray(total / draws)


def measure_passage(
    decoder: Decoder, tokens: Int[np.ndarray, " n"], noise: float, draws: int, key: PRNGKeyArray
) -> Passage:
    """All figures of one passage, of the positions that have SHORTEST_PAST tokens before and one after them."""
    kept = slice(SHORTEST_PAST, tokens.size - 1)
    layers = [layer_figures(layer, inputs) for layer, inputs in decoder.layers(tokens)]
    found = {name: np.stack([layer[name] for layer in layers])[..., kept] for name in layers[0]}
    each = {name: values.reshape(-1, values.shape[-1]) for name, values in found.items()}
    logits = decoder(tokens)
    figures = {
        "entropy": each["entropy"].mean(0),
        PAST_SHARE: each[PAST_SHARE].mean(0),
        "log position": np.log(np.arange(tokens.size)[kept]),
        "loss": np.asarray(token_losses(logits, jnp.asarray(tokens)))[kept],
        "change": logit_change(decoder, tokens, logits, noise, draws, key)[kept],
    }
    for reading in READINGS:
        barrier, sign = -each[f"{reading} log_det"], each[f"{reading} sign"]
        figures |= {
            f"{reading} closest": barrier.max(0),
            f"{reading} mean": barrier.mean(0),
            f"{reading} negative": (sign < 0).mean(0),
        }
    negative = {reading: (found[f"{reading} sign"] < 0).mean(-1) for reading in READINGS}
    return Passage({name: np.asarray(x, np.float64) for name, x in figures.items()}, negative)


def layer_figures(layer: Attention, inputs: Float[Array, "n d"]) -> dict[str, Float[np.ndarray, "H n"]]:
    """Sign, log|det J_i| in nats under both readings, entropy and past share, of every head and position."""
    found = dict(zip(("entropy", PAST_SHARE), map(np.asarray, attention(layer, inputs)), strict=True))
    for reading in READINGS:
        margins = layer_margins(layer, inputs, self_inclusive=reading == "inclusive")
        found |= {f"{reading} sign": np.asarray(margins.sign), f"{reading} log_det": np.asarray(margins.log_det)}
    return found


def documents(text: Path | None) -> list[str]:
    """The validation articles of the Wikipedia sample, or the documents in a UTF-8 file, which form feeds separate."""
    whole = wikipedia.prepare().read_text(encoding="utf-8") if text is None else read_user_text("--text", text)
    found = whole.split(wikipedia.DOCUMENT_SEPARATOR)
    # The validation articles of models.corpus.
    return found[4::10] if text is None else found


def passages(
    documents: Iterable[Int[np.ndarray, " n"]], length: int, count: int
) -> Iterator[Int[np.ndarray, " length"]]:
    """`count` passages of `length` tokens, taken in turn from the documents, none overlapping another."""
    whole = [document[: document.size // length * length].reshape(-1, length) for document in documents]
    available = sum(len(pieces) for pieces in whole)
    if available < count:
        raise ValueError(
            f"--text: holds {available} passages of {length} tokens, not {count}; pass more text or fewer --passages."
        )
    in_turn = zip_longest(*whole)
    yield from islice((piece for pieces in in_turn for piece in pieces if piece is not None), count)
