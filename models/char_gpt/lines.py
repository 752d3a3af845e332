"""One JSON object a line, one line a finished run: a file that grows, of which a kill costs at most the last line.

A finished file may be kept compressed: `bzip2 runs.jsonl` leaves runs.jsonl.bz2, which is read in its place.
"""

import bz2
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from prob_transformer.files import write_text

NAME = "runs.jsonl"


def stored_at(path: Path) -> Path:
    """The file that holds the lines of `path`: `path` itself, or its compressed form where that form alone exists."""
    compressed = path.with_name(f"{path.name}.bz2")
    return compressed if compressed.exists() and not path.exists() else path


def _text(path: Path) -> str:
    content = path.read_bytes()
    return (bz2.decompress(content) if path.suffix == ".bz2" else content).decode("utf-8")


def read(path: Path, option: str = "--out") -> list[dict[str, Any]]:
    """Lines written whole, in order; [] if there is no file. Raises ValueError naming the option if one is no run."""
    path = stored_at(path)
    try:
        text = _text(path)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise ValueError(f"{option}: {path} cannot be read ({error}); pass another folder.") from None
    found = []
    # What follows the last line end was being written when the sweep was killed.
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            run = json.loads(line)
            run["run"], run["provenance"]
            found.append(run)
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{option}: line {number} of {path} is not of a run; delete that line.") from None
    return found


def drop_torn_end(path: Path) -> None:
    """Cut off a line that was being written when the sweep was killed."""
    if path.exists():
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            write_text(path, whole.decode("utf-8"))


def shortened(value: Any) -> Any:
    """Floats to the seven significant digits that float32 carries, all through a tree of lists and dictionaries."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {key: shortened(entry) for key, entry in value.items()}
    return [shortened(entry) for entry in value] if isinstance(value, list) else value


def finite_or_none(value: Any) -> float | None:
    """A number for JSON, which has no infinities: None in place of one."""
    return float(value) if np.isfinite(value) else None


def append(path: Path, run: dict[str, Any]) -> None:
    """Add a line to the plain file and have it on disk before going on; lines kept compressed are unpacked first.

    NaN and infinities are refused, for they are not JSON.
    """
    line = json.dumps(run, allow_nan=False) + "\n"
    kept = stored_at(path)
    if kept != path:
        write_text(path, _text(kept))
        drop_torn_end(path)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(line)
        stream.flush()
        os.fsync(stream.fileno())
