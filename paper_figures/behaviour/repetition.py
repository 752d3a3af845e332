"""Do low margins come before repetition or errors? `python -m paper_figures.behaviour.repetition --out FILE`.

A decoder continues passages of real text, greedily and at a temperature. Of every position, over all layers and heads,
with identity values over the strict past:

    lowest     smallest log|det J_i|, in nats         mean        mean log|det J_i|
    positive   share of heads with det J_i > 0

so that a low figure is a small margin in all three.

Errors: the surprise -log p(x_{i+1} | x_<=i) in nats of the token that follows, in the real text as well. Spearman's
correlation over the positions of a text, alone and given what is linear in the position; the mean over texts.

Repetition: the onset of a text is the first generated token from which RUN tokens are the same as RUN tokens that began
earlier in the text, prompt included. Let a_t be the mean of a figure over the BEFORE positions that end at the one which
token t was predicted from. A text with its onset at t is compared with those that have none up to t, at the same t:

    concordance = mean over onsets of the share of those texts whose a_t is larger, ties half

1/2 if figures say nothing, above if margins are lower before an onset. Comparing at the same t takes out the position.
Intervals are 95 % by bootstrap over texts.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from models.cli import run
from paper_figures.behaviour.correlations import LEVEL, partial_correlation
from paper_figures.behaviour.measure import documents, passages, token_losses
from paper_figures.behaviour.options import configuration, parsed
from prob_transformer import layer_margins
from prob_transformer.files import provenance, write_json
from prob_transformer.pretrained.decoder import Decoder
from prob_transformer.pretrained.generation import continue_texts
from prob_transformer.pretrained.load import load_pretrained
from prob_transformer.tables import text_table

RUN = 8
BEFORE = 8
FIGURES = ("lowest", "mean", "positive")
_TEMPERATURE = ("temperature", 0.7, "of the drawn texts")
_COUNTS = {
    "texts": (32, 4, "texts that are continued, which the intervals are over"),
    "prompt": (32, 16, "tokens of a prompt"),
    "length": (128, 2 * RUN, "tokens that follow it"),
    "resamples": (2000, 100, "bootstrap resamples"),
    "seed": (0, 0, "seed of the draws and of the bootstrap"),
}


class Text(NamedTuple):
    """Margins by name of the m positions that generated tokens were predicted from, surprise (m,), and the onset."""

    margins: dict[str, Float[np.ndarray, " m"]]
    surprise: Float[np.ndarray, " m"]
    onset: int | None


def onset_of_repetition(tokens: Int[np.ndarray, " n"], first: int, length: int = RUN) -> int | None:
    """The first number i >= `first` for which tokens[i : i + length] began earlier in the text as well, or None."""
    begun = dict[tuple[int, ...], int]()
    for i in range(len(tokens) - length + 1):
        there = tuple(tokens[i : i + length].tolist())
        if i >= first and there in begun:
            return i
        begun.setdefault(there, i)
    return None


def measure_text(decoder: Decoder, tokens: Int[np.ndarray, " n"], prompt: int) -> Text:
    """The figures of a text of which the first `prompt` tokens were given."""
    positions = list(range(prompt - 1, len(tokens) - 1))
    found = [layer_margins(layer, inputs, positions=positions) for layer, inputs in decoder.layers(tokens)]
    log_det = np.concatenate([np.asarray(layer.log_det, np.float64) for layer in found])
    sign = np.concatenate([np.asarray(layer.sign) for layer in found])
    surprise = np.asarray(token_losses(decoder(tokens), jnp.asarray(tokens)), np.float64)[prompt - 1 :]
    margins = {"lowest": log_det.min(0), "mean": log_det.mean(0), "positive": (sign > 0).mean(0)}
    onset = onset_of_repetition(tokens, prompt)
    return Text(margins, surprise, None if onset is None else onset - prompt)


def _shares(texts: Sequence[Text], figure: str) -> Float[np.ndarray, "e c"]:
    """Of every onset, 1 for each text that is compared with it and larger, 1/2 if equal, nan if not compared."""
    shares = np.full((len(texts), len(texts)), np.nan)
    for row, text in enumerate(texts):
        if text.onset is None or text.onset + 1 < BEFORE:
            continue
        there = slice(text.onset + 1 - BEFORE, text.onset + 1)
        own = text.margins[figure][there].mean()
        for column, other in enumerate(texts):
            if other.onset is None or other.onset > text.onset:
                larger = other.margins[figure][there].mean()
                shares[row, column] = (larger > own) + (larger == own) / 2
    return shares


def _mean_share(shares: Float[np.ndarray, "e c"], drawn: Int[np.ndarray, " k"]) -> float:
    """The concordance of the texts drawn, nan where none of them has an onset that can be compared."""
    chosen = shares[np.ix_(drawn, drawn)]
    compared = (~np.isnan(chosen)).sum(1)
    rows = compared > 0
    return float((np.nansum(chosen[rows], 1) / compared[rows]).mean()) if rows.any() else float("nan")


def concordance(texts: Sequence[Text], figure: str, resamples: int, seed: int) -> dict[str, Any]:
    """The concordance of the module docstring, its interval, and the number of onsets that it is over.

    An onset counts from the token on before which there are BEFORE positions. Both are None where no onset can be
    compared with any other text.
    """
    shares, rng = _shares(texts, figure), np.random.default_rng(seed)
    onsets = int((~np.isnan(shares)).any(1).sum())
    if not onsets:
        return {"concordance": None, "interval": None, "onsets": 0}
    drawn = [_mean_share(shares, rng.integers(len(texts), size=len(texts))) for _ in range(resamples)]
    low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {
        "concordance": _mean_share(shares, np.arange(len(texts))),
        "interval": [float(low), float(high)],
        "onsets": onsets,
    }


def surprise_correlation(
    texts: Sequence[Text], figure: str, given_position: bool, resamples: int, seed: int
) -> dict[str, Any]:
    """The mean over texts of the correlation of a figure with the surprise within a text, and its interval."""
    controls = [np.arange(len(text.surprise), dtype=float) for text in texts]
    each = np.array(
        [
            partial_correlation(text.margins[figure], text.surprise, [position] if given_position else [])
            for text, position in zip(texts, controls, strict=True)
        ]
    )
    drawn = np.random.default_rng(seed).choice(each, (resamples, len(each))).mean(1)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"correlation": float(each.mean()), "interval": [float(low), float(high)]}


def continued(
    decoder: Decoder, prompts: Int[np.ndarray, "B m"], length: int, temperature: float, seed: int
) -> Int[np.ndarray, "B n"]:
    """The prompts, each with `length` tokens that the decoder drew."""
    keys = jax.random.split(jax.random.key(seed), len(prompts))
    steps = continue_texts(decoder, prompts, length, keys=keys, temperature=temperature)
    drawn = [np.asarray(step.tokens) for step in tqdm(steps, desc=f"temperature {temperature}", total=length)]
    return np.concatenate([prompts, np.stack(drawn, axis=1)], axis=1)


def shown(found: dict[str, Any], name: str) -> str:
    """A figure and its interval, as the page and the terminal give them."""
    value, interval = found[name], found["interval"]
    if value is None:
        return "no onset"
    form = "{:.2f} ({:.2f} to {:.2f})" if name == "concordance" else "{:+.2f} ({:+.2f} to {:+.2f})"
    return form.format(value, *interval)


def rows(kinds: dict[str, Any]) -> Iterator[list[str]]:
    """The rows of the table: kind, figure, both correlations with the surprise, concordance."""
    for kind, found in kinds.items():
        for figure in FIGURES:
            cells = [shown(one, "correlation") for one in found["surprise"][figure].values()]
            repetition = shown(found["repetition"][figure], "concordance") if "repetition" in found else ""
            yield [kind, figure, *cells, repetition]


def main(argv: list[str] | None = None) -> None:
    arguments = parsed(
        "python -m paper_figures.behaviour.repetition",
        "Margins before repetition and errors.",
        _TEMPERATURE,
        _COUNTS,
        argv,
    )
    texts = documents(arguments.text)
    model = load_pretrained(arguments.model)
    whole = arguments.prompt + arguments.length
    if whole > model.decoder.context:
        raise ValueError(f"--length: prompt and text have {whole} tokens; the context is {model.decoder.context}.")
    encoded = [np.asarray(model.tokenizer.encode(text, add_special_tokens=False).ids, np.int32) for text in texts]
    # Taken before the work, so that a commit made meanwhile is not taken for the one that ran.
    origin = provenance(arguments.seed, configuration(arguments))
    begin = time.monotonic()
    real = np.stack(list(passages(encoded, whole, arguments.texts)))
    prompts, options = real[:, : arguments.prompt], (arguments.length,)
    drawn = {
        "real": real,
        "greedy": continued(model.decoder, prompts, *options, 0.0, arguments.seed),
        f"temperature {arguments.temperature}": continued(
            model.decoder, prompts, *options, arguments.temperature, arguments.seed
        ),
    }
    kinds = dict[str, Any]()
    for kind, tokens in drawn.items():
        found = [measure_text(model.decoder, text, arguments.prompt) for text in tqdm(tokens, desc=kind)]
        kinds[kind] = {
            "surprise": {
                figure: {
                    name: surprise_correlation(found, figure, given, arguments.resamples, arguments.seed)
                    for name, given in (("alone", False), ("given the position", True))
                }
                for figure in FIGURES
            },
            "mean_surprise": float(np.mean([text.surprise for text in found])),
        }
        if kind != "real":
            kinds[kind]["repetition"] = {
                figure: concordance(found, figure, arguments.resamples, arguments.seed) for figure in FIGURES
            }
            kinds[kind]["onsets"] = [text.onset for text in found]
    record = {
        "kinds": kinds,
        "run": RUN,
        "before": BEFORE,
        "seconds": time.monotonic() - begin,
        "model_sha256": model.sha256,
        "provenance": origin,
    }
    write_json(arguments.out, record)
    headings = ("text", "figure", "with surprise", "given the position", "concordance before a repetition")
    print(text_table(headings, list(rows(kinds))))
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    run(main)
