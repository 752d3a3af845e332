"""`python -m paper_figures.behaviour --model smollm2 --out FILE.json`: margins of a trained decoder against what it does.

Without --text, passages come from the validation articles of the Wikipedia sample. With it, from that UTF-8 file; form
feeds in it separate documents.
"""

import time
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from models.cli import run
from paper_figures.behaviour.correlations import described, relate
from paper_figures.behaviour.measure import (
    BASELINES,
    MARGINS,
    OUTCOMES,
    PAST_SHARE,
    READINGS,
    Passage,
    documents,
    measure_passage,
    passages,
)
from paper_figures.behaviour.options import configuration, parsed
from prob_transformer.files import provenance, write_json
from prob_transformer.pretrained.load import load_pretrained
from prob_transformer.tables import text_table

_NOISE = ("noise", 0.1, "noise over embedding RMS")
_COUNTS = {
    "passages": (20, 2, "passages of text, which the intervals are over"),
    "tokens": (128, 16, "tokens a passage"),
    "draws": (4, 1, "draws of embedding noise a passage"),
    "resamples": (2000, 100, "bootstrap resamples"),
    "seed": (0, 0, "seed of noise and bootstrap"),
}
# What a correlation is given, one after the other; the verdicts are on the first two.
COLUMNS = ("alone", "given entropy and log position", "and past share")


def relations(found: list[Passage], resamples: int, seed: int) -> list[dict[str, Any]]:
    """Every margin against every outcome, alone and given the baselines, with the verdict."""
    figures = [passage.figures for passage in found]
    # A verdict looks at two correlations of each pair.
    comparisons = 2 * len(MARGINS) * len(OUTCOMES)
    # What each correlation is given, in the words of the rows.
    given = {"alone": (), "given entropy": ("entropy",), COLUMNS[1]: BASELINES, COLUMNS[2]: (*BASELINES, PAST_SHARE)}
    rows = []
    for outcome in OUTCOMES:
        for figure in ("entropy", PAST_SHARE, *MARGINS):
            asked = {"entropy": COLUMNS[:1], PAST_SHARE: COLUMNS[:2]}.get(figure, tuple(given))
            correlations = {
                name: relate(figures, figure, outcome, given[name], comparisons, resamples, seed) for name in asked
            }
            row = {"figure": figure, "outcome": outcome, **{name: one._asdict() for name, one in correlations.items()}}
            if figure == "entropy":
                baseline = correlations["alone"]
            if figure in MARGINS:
                row["verdict"] = described(figure, outcome, correlations["alone"], correlations[COLUMNS[1]], baseline)
            rows.append(row)
    return rows


def _shown(found: dict[str, Any] | None) -> str:
    return "{:+.2f} ({:+.2f} to {:+.2f})".format(found["correlation"], *found["interval"]) if found else ""


def main(argv: list[str] | None = None) -> None:
    arguments = parsed("python -m paper_figures.behaviour", "Margins against behaviour.", _NOISE, _COUNTS, argv)
    texts = documents(arguments.text)
    model = load_pretrained(arguments.model)
    if arguments.tokens > model.decoder.context:
        raise ValueError(f"--tokens: got {arguments.tokens}; the model's context is {model.decoder.context}.")
    encoded = [np.asarray(model.tokenizer.encode(text, add_special_tokens=False).ids, np.int32) for text in texts]
    chosen = list(passages(encoded, arguments.tokens, arguments.passages))
    keys = jax.random.split(jax.random.key(arguments.seed), len(chosen))
    begin = time.monotonic()
    found = [
        measure_passage(model.decoder, tokens, arguments.noise, arguments.draws, key)
        for tokens, key in zip(tqdm(chosen, desc="passages"), keys, strict=True)
    ]
    seconds = time.monotonic() - begin
    rows = relations(found, arguments.resamples, arguments.seed)
    negative = {reading: np.mean([passage.negative[reading] for passage in found], 0) for reading in READINGS}
    write_json(
        arguments.out,
        {
            "tokens": int(sum(passage.figures["loss"].size for passage in found)),
            "median": {
                name: float(np.median(np.concatenate([passage.figures[name] for passage in found])))
                for name in (*OUTCOMES, *MARGINS, *BASELINES, PAST_SHARE)
            },
            "relations": rows,
            "negative_share": {reading: share.tolist() for reading, share in negative.items()},
            "seconds": seconds,
            "model_sha256": model.sha256,
            "provenance": provenance(arguments.seed, configuration(arguments)),
        },
    )
    print("Spearman correlation over tokens, 95 % bootstrap interval over passages")
    cells = [[row["outcome"], row["figure"], *(_shown(row.get(name)) for name in COLUMNS)] for row in rows]
    print(text_table(("outcome", "figure", *COLUMNS), cells))
    print("\n".join(row["verdict"] for row in rows if "verdict" in row))
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    run(main)
