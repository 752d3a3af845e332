"""The pieces of HTML that sections of the report share."""

from html import escape

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #111; }
p, ul, figcaption { max-width: 62rem; } h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.85rem; }
th, td { border-bottom: 1px solid #ccc; padding: 0.35rem 0.5rem; text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number, td:first-child { white-space: nowrap; }
figure { margin: 1.5rem 0; } figure img { max-width: 100%; height: auto; } figcaption { font-size: 0.9rem; color: #333; }
code, pre { font-size: 0.85rem; } .bad { font-weight: bold; text-decoration: underline; }
"""


def table(header: list[tuple[str, bool]], rows: list[list[str]]) -> str:
    """An HTML table; header entries say whether their column is of numbers. Cells are HTML already."""
    kinds = [' class="number"' if number else "" for _, number in header]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for kind, (name, _) in zip(kinds, header, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def plain_table(headings: tuple[str, ...], cells: list[list[str]], numbers: range) -> str:
    """A table of plain text; the columns in `numbers` are numbers, with what is in brackets below them."""
    header = [(heading, index in numbers) for index, heading in enumerate(headings)]
    rows = [[escape(cell) for cell in row] for row in cells]
    for row in rows:
        for index in numbers:
            row[index] = row[index].replace(" (", "<br>(")
    return table(header, rows)


def items(sentences: list[str]) -> str:
    """A list of plain sentences."""
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"
