"""An inspection for the terminal: a line a layer, the heads most often past the boundary, and what it means."""

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prob_transformer.inspection.inspection import Inspection
from prob_transformer.inspection.summary import QUANTILES, Summary, summary, worst_first, worst_heads
from prob_transformer.inspection.wording import density_reading, map_in_words, shown

# Short, so that both tables fit 80 columns; b is the barrier.
_QUANTILES = [f"b {q:.0%}" for q in QUANTILES]
# The least of a token that is shown in a narrow terminal.
_TOKEN_WIDTH = 10


def _share(value: float) -> str:
    return f"{value:.1%}" if value else "0"


def _nats(value: float) -> str:
    """A barrier in at most seven characters."""
    size = abs(value)
    if size >= 99999.5:
        return f"{value:.1e}"
    return f"{value:z.2f}" if size < 999.995 else f"{value:z.0f}"


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Table:
    """A table whose numbers are never cut; a column of tokens after them is, to the width that is left."""
    table = Table(title=title, title_justify="left")
    used = 1
    for index, column in enumerate(columns):
        wide = max(map(len, (*column.split("\n"), *(row[index] for row in rows))))
        table.add_column(column, justify="right", no_wrap=True, min_width=wide)
        # A rule and two spaces.
        used += wide + 3
    if len(rows[0]) > len(columns):
        table.add_column("at token", no_wrap=True, max_width=max(_TOKEN_WIDTH, width - used - 3))
    for row in rows:
        table.add_row(*row)
    return table


def _layers(inspection: Inspection, found: Summary, width: int) -> Table:
    rows = []
    for row, layer in enumerate(inspection.layers):
        barrier = -inspection.log_det[row, :, 1:]
        quantiles = np.quantile(barrier, QUANTILES, method="inverted_cdf")
        negative = found.negative[row]
        rows.append(
            (
                str(layer),
                _share(negative.mean()),
                f"{(negative > 0).sum()} of {negative.size}",
                str(found.crossings[row].sum()),
                *map(_nats, quantiles),
                str(worst_first(negative, barrier)[0]),
            )
        )
    columns = ("layer", "det<0", "in heads", "cross-\nings", *_QUANTILES, "worst\nhead")
    return _table("Layers: all heads together", columns, rows, width)


def _heads(inspection: Inspection, found: Summary, count: int, width: int) -> Table:
    rows = []
    for row, head in worst_heads(inspection, found)[:count]:
        closest = found.closest[row, head]
        rows.append(
            (
                str(inspection.layers[row]),
                str(head),
                _share(found.negative[row, head]),
                str(found.crossings[row, head]),
                *map(_nats, found.quantiles[row, head]),
                _nats(-inspection.log_det[row, head, closest]),
                # A token may look like markup.
                escape(f"{closest} {shown(inspection.pieces[closest])}"),
            )
        )
    columns = ("layer", "head", "det<0", "cross-\nings", *_QUANTILES, "max b")
    return _table("Heads: most often past the boundary, then closest to it", columns, rows, width)


def print_tables(console: Console, inspection: Inspection, rows: int) -> None:
    """Prints both tables, and what was analysed and what the negative signs mean. `rows` heads are shown.

    A terminal that is too narrow for the numbers gets lines that are longer than it is, and wraps them.
    """
    found = summary(inspection)
    for table in (_layers(inspection, found, console.width), _heads(inspection, found, rows, console.width)):
        console.print(table, width=max(console.width, console.measure(table).minimum), crop=False)
    verdict = density_reading(found.negative, inspection.setting)
    console.print(escape(f"{map_in_words(inspection.setting)} b = -log|det J| in nats, the barrier.\n{verdict}"))
