"""Every method against plain cross-entropy, paired by seed: the figures that the report and its sentences are made of."""

from typing import NamedTuple

import numpy as np

from paper_figures.runs import Runs, noise_rows, seed_of, weight_of

BASELINE = "ce"
# The noise levels that the table shows: as large as the embeddings themselves, and a fixed one.
RELATIVE_SIGMA, ABSOLUTE_SIGMA = 1.0, 0.2


class Spread(NamedTuple):
    """Mean, smallest and largest over seeds."""

    mean: float
    smallest: float
    largest: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(float(np.mean(values)), min(values), max(values))


class Comparison(NamedTuple):
    """One method: losses in nats per character, changes against the baseline of the same seed in per cent."""

    method: str
    weight: float
    seeds: tuple[int, ...]
    clean_loss: Spread
    clean_change: Spread
    relative_increase: Spread
    relative_change: Spread
    absolute_increase: Spread
    absolute_change: Spread
    embedding_rms: Spread
    negative_share: Spread
    crossing_steps: Spread


def increase(run: dict, kind: str, sigma: float) -> float:
    """By how much noise raises the loss of a run, in nats per character."""
    return next(row["increase"] for row in noise_rows(run, kind) if row["sigma"] == sigma)


def compare(runs: Runs) -> list[Comparison]:
    """A comparison a method, in the order of the sweep. Raises ValueError if the baseline or one of its seeds is missing."""
    baseline = {seed_of(run): run for run in runs.by_method.get(BASELINE, [])}
    compared = []
    for method, members in runs.by_method.items():
        seeds = tuple(seed_of(run) for run in members)
        if not baseline.keys() >= set(seeds):
            raise ValueError(f"--results: the sweep has {method} for seeds without {BASELINE}; finish the sweep.")

        def change(figure, members=members) -> Spread:
            pairs = [(figure(run), figure(baseline[seed_of(run)])) for run in members]
            return Spread.of([100 * (value / reference - 1) for value, reference in pairs])

        def values(figure, members=members) -> Spread:
            return Spread.of([figure(run) for run in members])

        def clean(run: dict) -> float:
            return run["clean_loss"]["nats_per_character"]

        def relative(run: dict) -> float:
            return increase(run, "relative", RELATIVE_SIGMA)

        def absolute(run: dict) -> float:
            return increase(run, "absolute", ABSOLUTE_SIGMA)

        def crossing_steps(run: dict) -> float:
            seen = run["crossings"]["layers"]
            return seen["steps_with_crossing"] / seen["steps_watched"]

        compared.append(
            Comparison(
                method=method,
                weight=weight_of(members[0]),
                seeds=seeds,
                clean_loss=values(clean),
                clean_change=change(clean),
                relative_increase=values(relative),
                relative_change=change(relative),
                absolute_increase=values(absolute),
                absolute_change=change(absolute),
                embedding_rms=values(lambda run: run["embedding_rms"]),
                negative_share=values(lambda run: run["margins"]["layers"]["negative_share"]),
                crossing_steps=values(crossing_steps),
            )
        )
    return compared


def markdown_table(compared: list[Comparison]) -> str:
    """The table of the README: mean over seeds, with the smallest and largest change against the baseline."""

    def change(spread: Spread) -> str:
        return f"{spread.mean:+.2f} % ({spread.smallest:+.2f} to {spread.largest:+.2f})"

    rows = [
        "| method | clean loss (nats/char) | change | noise 1.0 RMS: increase | change | noise 0.2: increase | change "
        "| det J <= 0 in layers |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for c in compared:
        is_baseline = c.method == BASELINE
        cells = [c.method]
        for value, against in (
            (c.clean_loss, c.clean_change),
            (c.relative_increase, c.relative_change),
            (c.absolute_increase, c.absolute_change),
        ):
            cells += [f"{value.mean:.3f}", "" if is_baseline else change(against)]
        rows.append("| " + " | ".join([*cells, f"{c.negative_share.mean:.2%}"]) + " |")
    return "\n".join(rows)


def sentence(comparison: Comparison) -> str:
    """What the seeds say of one method, in words: a direction is named only if every seed shows it."""

    def direction(change: Spread, worse: str, better: str) -> str:
        if change.smallest > 0:
            return f"{change.mean:.2f} % {worse} (every seed)"
        if change.largest < 0:
            return f"{-change.mean:.2f} % {better} (every seed)"
        return f"undecided (from {change.smallest:+.2f} % to {change.largest:+.2f} % over seeds)"

    return (
        f"{comparison.method}: clean loss {direction(comparison.clean_change, 'worse', 'better')}; loss increase under "
        f"noise of {RELATIVE_SIGMA:g} RMS {direction(comparison.relative_change, 'larger', 'smaller')}, under noise of fixed "
        f"size {ABSOLUTE_SIGMA:g} {direction(comparison.absolute_change, 'larger', 'smaller')}; det J &le; 0 at "
        f"{comparison.negative_share.mean:.2%} of the layers' positions."
    )
