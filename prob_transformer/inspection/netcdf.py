"""An inspection as an `xarray.DataTree`, to be written by `prob_transformer.inference.result_tree.save`.

    /text       token, token_number                                        (position)
    /margins    sign, log_det, barrier, determinant                        (layer, head, position)
    /carriers   carrier, share                                             (layer, head, position, rank)
    /summary    negative_share, crossings, barrier_quantile, closest       (layer, head[, quantile])

`layer` has the numbers of the layers in the model as coordinates. `determinant` is det J_i with its sign, in float64: 0
or inf where even that range is left, so compare barriers.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from prob_transformer._extras import require
from prob_transformer.inspection.text_margins import QUANTILES, Inspection

if TYPE_CHECKING:
    import xarray as xr

_HEADS = ("layer", "head")
_PLACES = (*_HEADS, "position")


def inspection_tree(inspection: Inspection, attrs: Mapping[str, Any]) -> "xr.DataTree":
    """The inspection as an xarray.DataTree, with `attrs` (text, or what JSON holds) and the setting as its attributes.

    Raises MissingExtraError without xarray.
    """
    require("inspect", "xarray")
    import xarray as xr

    log_det, found, nats = inspection.log_det, inspection.summary, {"units": "nats"}
    with np.errstate(over="ignore"):
        determinant = inspection.sign * np.exp(log_det.astype(np.float64))
    # netCDF ends a text at its first NUL, which a token may be.
    text = np.array([piece.replace("\0", "\N{SYMBOL FOR NULL}") for piece in inspection.pieces], dtype=object)
    groups: dict[str, dict[str, tuple[Any, ...]]] = {
        "text": {"token": (("position",), text), "token_number": (("position",), inspection.tokens)},
        "margins": {
            "sign": (_PLACES, inspection.sign),
            "log_det": (_PLACES, log_det, nats),
            "barrier": (_PLACES, -log_det, nats),
            "determinant": (_PLACES, determinant),
        },
        "carriers": {
            "carrier": ((*_PLACES, "rank"), inspection.carriers.astype(np.int32)),
            "share": ((*_PLACES, "rank"), inspection.shares),
        },
        "summary": {
            "negative_share": (_HEADS, found.negative),
            "crossings": (_HEADS, found.crossings),
            "barrier_quantile": ((*_HEADS, "quantile"), found.quantiles, nats),
            "closest": (_HEADS, found.closest),
        },
    }
    sizes = zip((*_PLACES, "rank"), inspection.carriers.shape, strict=True)
    coords = {name: np.arange(size) for name, size in sizes} | {"layer": inspection.layers, "quantile": QUANTILES}
    tree = xr.DataTree.from_dict(
        {
            group: xr.Dataset(variables, {dim: list(coords[dim]) for dims, *_ in variables.values() for dim in dims})
            for group, variables in groups.items()
        }
    )
    given = {**attrs, "setting": inspection.setting._asdict()}
    tree.attrs = {
        name: value if isinstance(value, str) else json.dumps(value, allow_nan=False) for name, value in given.items()
    }
    return tree
