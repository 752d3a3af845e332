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
from prob_transformer.inspection.inspection import Inspection
from prob_transformer.inspection.summary import QUANTILES, summary

if TYPE_CHECKING:
    import xarray as xr


def tree(inspection: Inspection, attrs: Mapping[str, Any]) -> "xr.DataTree":
    """The tree, with `attrs` (text, or what JSON holds) and the setting as its attributes.

    Raises MissingExtraError without xarray.
    """
    require("inspect", "xarray")
    import xarray as xr

    log_det, found = inspection.log_det, summary(inspection)
    heads = {"layer": list(inspection.layers), "head": np.arange(log_det.shape[1])}
    places = {**heads, "position": np.arange(log_det.shape[2])}
    ranks = {**places, "rank": np.arange(inspection.carriers.shape[3])}
    along_text, along_heads = ("layer", "head", "position"), ("layer", "head")
    nats = {"units": "nats"}
    with np.errstate(over="ignore"):
        determinant = inspection.sign * np.exp(log_det.astype(np.float64))
    # netCDF ends a text at its first NUL, which a token may be.
    text = np.array([piece.replace("\0", "\N{SYMBOL FOR NULL}") for piece in inspection.pieces], dtype=object)
    groups = {
        "text": xr.Dataset(
            {"token": (("position",), text), "token_number": (("position",), inspection.tokens)},
            coords={"position": places["position"]},
        ),
        "margins": xr.Dataset(
            {
                "sign": (along_text, inspection.sign),
                "log_det": (along_text, log_det, nats),
                "barrier": (along_text, -log_det, nats),
                "determinant": (along_text, determinant),
            },
            coords=places,
        ),
        "carriers": xr.Dataset(
            {
                "carrier": ((*along_text, "rank"), inspection.carriers.astype(np.int32)),
                "share": ((*along_text, "rank"), inspection.shares),
            },
            coords=ranks,
        ),
        "summary": xr.Dataset(
            {
                "negative_share": (along_heads, found.negative),
                "crossings": (along_heads, found.crossings),
                "barrier_quantile": ((*along_heads, "quantile"), found.quantiles, nats),
                "closest": (along_heads, found.closest),
            },
            coords={**heads, "quantile": list(QUANTILES)},
        ),
    }
    whole = xr.DataTree.from_dict(groups)
    setting = {"values": inspection.setting.values, "self_inclusive": inspection.setting.self_inclusive}
    given = {**attrs, "setting": setting}
    whole.attrs = {
        name: value if isinstance(value, str) else json.dumps(value, allow_nan=False) for name, value in given.items()
    }
    return whole
