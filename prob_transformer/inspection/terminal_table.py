"""An inspection for the terminal: a line a layer, the heads most often past the boundary, and what it means."""

import textwrap

import numpy as np

from prob_transformer.inspection.explanation import density_reading, map_in_words, quoted
from prob_transformer.inspection.text_margins import QUANTILES, Inspection
from prob_transformer.tables import text_table

# Short, so that both tables fit 80 columns; b is the barrier.
_FIGURES = ("cross-\nings", *(f"b {q:.0%}" for q in QUANTILES))


def _share(value: float) -> str:
    return f"{value:.1%}" if value else "0"


def _nats(value: float) -> str:
    """A barrier in at most seven characters."""
    size = abs(value)
    if size >= 99999.5:
        return f"{value:.1e}"
    return f"{value:z.2f}" if size < 999.995 else f"{value:z.0f}"


def terminal_tables(inspection: Inspection, count: int, width: int) -> str:
    """Both tables, and what was analysed and what the negative signs mean. `count` heads are shown.

    Numbers are never cut: where `width` is too small for them, lines are longer.
    """
    found, barrier = inspection.summary, -inspection.log_det[..., 1:]
    layers = []
    for row, layer in enumerate(inspection.layers):
        negative, worst = found.negative[row], found.worst[found.worst[:, 0] == row][0, 1]
        quantiles = np.quantile(barrier[row], QUANTILES, method="inverted_cdf")
        some = f"{(negative > 0).sum()} of {negative.size}"
        crossings = f"{found.crossings[row].sum()}"
        layers.append([f"{layer}", _share(negative.mean()), some, crossings, *map(_nats, quantiles), f"{worst}"])
    heads = []
    for row, head in found.worst[:count]:
        closest, quantiles = found.closest[row, head], found.quantiles[row, head]
        nats = map(_nats, (*quantiles, barrier[row, head].max()))
        token = f"{closest} {quoted(inspection.pieces[closest])}"
        figures = (_share(found.negative[row, head]), f"{found.crossings[row, head]}", *nats)
        heads.append([f"{inspection.layers[row]}", f"{head}", *figures, token])
    words = f"{map_in_words(inspection.setting)} b = -log|det J| in nats, the barrier."
    return "\n".join(
        [
            "Layers: all heads together",
            text_table(("layer", "det<0", "in heads", *_FIGURES, "worst\nhead"), layers, range(8)),
            "\nHeads: most often past the boundary, then closest to it",
            text_table(("layer", "head", "det<0", *_FIGURES, "max b", "at token"), heads, range(8), width),
            "",
            textwrap.fill(words, width),
            textwrap.fill(density_reading(found.negative, inspection.setting), width),
        ]
    )
