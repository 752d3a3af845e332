"""Tables for the terminal, in Markdown and in HTML, by tabulate: what looks like markup in a cell is shown as text.

Columns in `numbers` stand to the right; their places are counted from 0.
"""

from collections.abc import Collection, Sequence

from tabulate import tabulate

Rows = Sequence[Sequence[str]]
# The least that is shown of a text in a narrow terminal.
_SHORTEST = 10


def _table(headings: Sequence[str], rows: Rows, numbers: Collection[int], form: str) -> str:
    sides = ["right" if place in numbers else "left" for place in range(len(headings))]
    return tabulate(rows, headings, tablefmt=form, colalign=sides if rows else None, disable_numparse=True)


def text_table(headings: Sequence[str], rows: Rows, numbers: Collection[int] = (), width: int | None = None) -> str:
    """A table for the terminal. Where it is wider than `width`, texts of the last column are cut, and nothing else."""
    text = _table(headings, rows, numbers, "pretty")
    excess = 0 if width is None else max(map(len, text.splitlines())) - width
    if excess <= 0:
        return text
    longest = max(_SHORTEST, max(len(row[-1]) for row in rows) - excess)
    cut = [[*row[:-1], row[-1] if len(row[-1]) <= longest else f"{row[-1][: longest - 1]}…"] for row in rows]
    return _table(headings, cut, numbers, "pretty")


def markdown_table(headings: Sequence[str], rows: Rows) -> str:
    """A table for a page in Markdown, without padding, so that a change of one cell is a change of one line.

    Line ends within a cell become <br>.
    """
    escaped = [[cell.replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in (headings, *rows)]
    first, *others = ("|" + "".join(f" {cell} |" if cell else " |" for cell in row) for row in escaped)
    return "\n".join([first, "|" + "---|" * len(headings), *others])


def html_table(headings: Sequence[str], rows: Rows, numbers: Collection[int] = ()) -> str:
    """A table for a page in HTML, in an element of class "wide"; the page's style keeps line ends within a cell."""
    return f'<div class="wide">{_table(headings, rows, numbers, "html")}</div>'
