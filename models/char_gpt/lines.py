"""One JSON object a line, one line a finished run: a file that grows, of which a kill costs at most the last line."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from prob_transformer.provenance import write_text

NAME = "runs.jsonl"


def read(path: Path, option: str = "--out") -> list[dict[str, Any]]:
    """Lines written whole, in order; [] if there is no file. Raises ValueError naming the option if one is no run."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
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
    """Add a line and have it on disk before going on. NaN and infinities are refused, for they are not JSON."""
    line = json.dumps(run, allow_nan=False) + "\n"
    with path.open("a", encoding="utf-8") as stream:
        stream.write(line)
        stream.flush()
        os.fsync(stream.fileno())
