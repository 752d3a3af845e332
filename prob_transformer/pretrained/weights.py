"""Weights on disk by their stored names: each is read once, when it is asked for, and none is left unread.

A file with a weight that nobody asked for holds another model than its configuration says. Safetensors files of a
Hugging Face folder are opened here, GGUF files in gguf_file.py. Weights in pickled files are refused: opening one runs
whatever it holds.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open

from prob_transformer.pretrained.config_fields import read_json
from prob_transformer.pretrained.decoder import Block

# By stored name, what reads the weight.
Stored = dict[str, Callable[[], Any]]
Shapes = Mapping[str, tuple[int, ...]]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATING = {"F64", "F32", "F16", "BF16"}
# Buffers that older files hold and that follow from the configuration: rotary frequencies and causal masks.
_BUFFER = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.(bias|masked_bias))$")


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model: one, or several with an index. Raises ValueError for none."""
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    index = folder / _INDEX
    if not index.is_file():
        pickled = sorted(path.name for suffix in ("*.bin", "*.pt", "*.pth") for path in folder.glob(suffix))
        why = f"only {pickled[0]}, a pickled file that is not opened" if pickled else "none"
        raise ValueError(f"weights: {folder} has no {_SINGLE} ({why}); save the model as safetensors.")
    names = sorted(set(read_json(index, _Index, "copy the model folder again").weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"weights: {index} names {name}, which is not in the folder; save the model again.")
    return [folder / name for name in names]


def open_safetensors(folder: Path) -> Stored:
    """All weights of a folder. Raises ValueError for damaged or missing files and for weights that are not floating."""
    stored: Stored = {}
    for path in weight_files(folder):
        try:
            opened = safe_open(path, framework="flax")
            dtypes = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"weights: {path} is not a whole safetensors file ({error}); copy it again.") from None
        for name, dtype in dtypes.items():
            if _BUFFER.search(name):
                continue
            if dtype not in _FLOATING:
                raise ValueError(
                    f"weights: {path} holds {name} as {dtype}; quantised weights are not read: save the model in "
                    "float32, float16 or bfloat16."
                )
            if name in stored:
                raise ValueError(f"weights: {name} is in two files of {folder}; save the model again.")
            stored[name] = partial(opened.get_tensor, name)
    return stored


def read_weights(
    stored: Stored, names: Mapping[str, str], shapes: Shapes, layer: int | None = None
) -> dict[str, Float[np.ndarray, "..."]]:
    """The weights of these shapes in float32, taken out of `stored`; those that `names` lacks the model does not have.

    Raises ValueError for a weight that is missing, of another shape, not finite, or quantised as nothing here reads.
    """
    found = {}
    for name, shape in shapes.items():
        if name not in names:
            continue
        here = names[name].format(layer)
        if here not in stored:
            raise ValueError(f"weights: no {here}; pass the configuration that belongs to the weights, or copy both.")
        try:
            found[name] = np.asarray(stored.pop(here)()).astype(np.float32)
        except (NotImplementedError, ValueError) as error:
            raise ValueError(f"weights: {here} cannot be dequantised ({error}); save it in another format.") from None
        if found[name].shape != shape:
            raise ValueError(
                f"weights: {here} has shape {found[name].shape}, but its configuration asks for {shape}; pass "
                "the configuration that belongs to the weights."
            )
        if not np.isfinite(found[name]).all():
            raise ValueError(f"weights: {here} contains NaN or inf; the file is damaged, or its training diverged.")
    return found


def read_all_weights(
    stored: Stored,
    names: Mapping[str, str],
    shapes: Shapes,
    of_layer: Shapes,
    layers: int,
    block: Callable[[dict[str, Any]], Block],
) -> tuple[dict[str, Float[np.ndarray, "..."]], tuple[Block, ...]]:
    """The weights of a whole model: those of `shapes`, and a block of every layer from those of `of_layer`.

    Raises ValueError as `read_weights`, and for a weight that is left over.
    """
    whole = read_weights(stored, names, shapes)
    blocks = tuple([block(read_weights(stored, names, of_layer, layer)) for layer in range(layers)])
    if stored:
        raise ValueError(
            f"weights: {min(stored)} is stored, which a model of this configuration does not have; pass the "
            "configuration that belongs to the weights, or save the model again without it."
        )
    return whole, blocks
