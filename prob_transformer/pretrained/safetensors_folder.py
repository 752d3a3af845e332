"""Tensors of the safetensors files of a Hugging Face folder: floating ones, and none that is left unread.

Weights in pickled files are refused: opening one runs whatever it holds.
"""

import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open

from prob_transformer.pretrained.config import read_json

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


class Tensors:
    """The tensors by their stored names, without the prefix that the model's body has in its folder."""

    def __init__(self, folder: Path, prefix: str):
        """Raises ValueError for files that are missing or damaged, and for tensors that are not floating."""
        self._where: dict[str, Any] = {}
        self._folder = folder
        for path in weight_files(folder):
            try:
                opened = safe_open(path, framework="flax")
                names = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise ValueError(f"weights: {path} is not a whole safetensors file ({error}); copy it again.") from None
            for name, dtype in names.items():
                if _BUFFER.search(name):
                    continue
                if dtype not in _FLOATING:
                    raise ValueError(
                        f"weights: {path} holds {name} as {dtype}; quantised weights are not read: save the model in "
                        "float32, float16 or bfloat16."
                    )
                if name in self._where:
                    raise ValueError(f"weights: {name} is in two files of {folder}; save the model again.")
                self._where[name] = opened
        # A body saved without its head has no prefix.
        self._prefix = prefix if any(name.startswith(prefix) for name in self._where) else ""
        self._unread = set(self._where)

    def __call__(self, name: str) -> np.ndarray | None:
        """A tensor of the body in float32, None if there is none."""
        return self.outside(self._prefix + name)

    def outside(self, name: str) -> np.ndarray | None:
        """A tensor beside the body, such as the head, None if there is none."""
        if name not in self._where:
            return None
        self._unread.discard(name)
        return np.asarray(self._where[name].get_tensor(name)).astype(np.float32)

    def require_all_read(self) -> None:
        """Raises ValueError, naming one, if a tensor was not read: the model is another one than it says."""
        if self._unread:
            raise ValueError(
                f"weights: {self._folder} holds {min(self._unread)}, which a model of its config.json does not have; "
                "pass the config.json that belongs to the weights, or save the model again without it."
            )
