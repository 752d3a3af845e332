"""An inspection for the terminal: a line a layer, the heads most often past the boundary, and what it means."""

import numpy as np
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from prob_transformer.inspect.inspection import Inspection
from prob_transformer.inspect.summary import QUANTILES, Summary, summary
from prob_transformer.inspect.wording import density_reading, map_in_words

# Short, so that both tables fit 80 columns; b is the barrier.
_QUANTILES = [f"b {q:.0%}" for q in QUANTILES]


def shown(piece: str) -> str:
    """A token in quotes on one line; control characters and line breaks are written out."""
    return repr(piece) if piece else "(rest of a character)"


def _share(value: float) -> str:
    return f"{value:.1%}" if value else "0"


def _layers(inspection: Inspection, found: Summary) -> Table:
    table = Table(title="Layers: all heads together", title_justify="left")
    for column in ("layer", "det<0", "in heads", "crossings", *_QUANTILES, "worst head"):
        table.add_column(column, justify="right")
    for row, layer in enumerate(inspection.layers):
        barrier = -inspection.log_det[row, :, 1:]
        quantiles = np.quantile(barrier, QUANTILES, method="inverted_cdf")
        negative = found.negative[row]
        table.add_row(
            str(layer),
            _share(negative.mean()),
            f"{(negative > 0).sum()} of {negative.size}",
            str(found.crossings[row].sum()),
            *(f"{value:z.2f}" for value in quantiles),
            str(_worst_first(negative, barrier)[0]),
        )
    return table


def _worst_first(negative: np.ndarray, barrier: np.ndarray) -> np.ndarray:
    """Heads by share of negative determinants, then by largest barrier."""
    return np.lexsort((-barrier.max(-1), -negative))


def _heads(inspection: Inspection, found: Summary, rows: int) -> Table:
    table = Table(title="Heads: most often past the boundary, then closest to it", title_justify="left")
    for column in ("layer", "head", "det<0", "cross-\nings", *_QUANTILES, "max b"):
        # In a narrow terminal the token gives way, not a heading.
        table.add_column(column, justify="right", min_width=max(map(len, column.split("\n"))))
    table.add_column("at token", no_wrap=True)
    heads = inspection.sign.shape[1]
    barrier = -inspection.log_det[..., 1:].reshape(-1, inspection.tokens.size - 1)
    for index in _worst_first(found.negative.ravel(), barrier)[:rows]:
        row, head = divmod(int(index), heads)
        closest = found.closest[row, head]
        table.add_row(
            str(inspection.layers[row]),
            str(head),
            _share(found.negative[row, head]),
            str(found.crossings[row, head]),
            *(f"{value:z.2f}" for value in found.quantiles[row, head]),
            f"{-inspection.log_det[row, head, closest]:z.2f}",
            # A token may look like markup.
            escape(f"{closest} {shown(inspection.pieces[closest])}"),
        )
    return table


def tables(inspection: Inspection, rows: int) -> Group:
    """Both tables and, below them, what was analysed and what the negative signs mean. `rows` heads are shown."""
    found = summary(inspection)
    verdict = density_reading(found.negative, inspection.setting)
    return Group(
        _layers(inspection, found),
        _heads(inspection, found, rows),
        escape(f"{map_in_words(inspection.setting)} b = -log|det J| in nats, the barrier.\n{verdict}"),
    )
