"""An inspection as one HTML file that needs nothing else: no request leaves it, and its policy forbids any.

Numbers travel as base64 of little-endian arrays in the order layer, head, position: `sign` int8, `log_det` float32,
`carriers` uint16 with their `shares` in 255ths, uint8. Text is in JSON whose "<" is escaped, and the script only ever
puts it into text nodes, so no token can become markup.
"""

import base64
import html
import json
from collections.abc import Mapping
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np

from prob_transformer.inspection.explanation import density_reading, map_in_words
from prob_transformer.inspection.text_margins import Inspection

# What a carrier's place in 16 bits can hold; a page with more tokens than this would be too large to read anyway.
MOST_TOKENS = 2048


def _data(inspection: Inspection) -> str:
    """The numbers and tokens as JSON that can stand in a script element."""
    row, head = inspection.summary.worst[0].tolist()
    arrays = {
        "sign": (inspection.sign, "<i1"),
        "logDet": (inspection.log_det, "<f4"),
        "carriers": (inspection.carriers, "<u2"),
        "shares": (np.rint(255 * inspection.shares), "<u1"),
    }
    payload = {
        "worst": {"row": row, "head": head},
        "pieces": inspection.pieces,
        "layers": inspection.layers,
        "heads": inspection.sign.shape[1],
        "carriersEach": inspection.carriers.shape[3],
        **{name: base64.b64encode(array.astype(dtype).tobytes()).decode() for name, (array, dtype) in arrays.items()},
        "selfInclusive": inspection.setting.self_inclusive,
    }
    return json.dumps(payload, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def inspection_page(inspection: Inspection, title: str, facts: Mapping[str, Any]) -> str:
    """The page's HTML. `facts`, say model, text and version, are listed at its end.

    Raises ValueError for more than MOST_TOKENS tokens.
    """
    if inspection.tokens.size > MOST_TOKENS:
        raise ValueError(f"tokens: {inspection.tokens.size} are too many for a page; pass at most {MOST_TOKENS}.")
    css, js, template = [
        files("prob_transformer.inspection").joinpath(f"page.{part}").read_text(encoding="utf-8")
        for part in ("css", "js", "html")
    ]
    entries = [f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(fact))}</dd>" for name, fact in facts.items()]
    parts = {
        "title": html.escape(title),
        "css": css,
        "js": js,
        "map": html.escape(map_in_words(inspection.setting)),
        "reading": html.escape(density_reading(inspection.summary.negative, inspection.setting)),
        "facts": "".join(entries),
        "data": _data(inspection),
    }
    return Template(template).substitute(parts)
