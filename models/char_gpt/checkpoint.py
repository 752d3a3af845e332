"""One file a run, written whole or not at all: a line of JSON, then the arrays in NumPy's format, without pickle."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import equinox as eqx

from models.char_gpt.config import Config, renamed
from prob_transformer.files import atomic_path

if TYPE_CHECKING:
    from models.char_gpt.training import State

NAME = "checkpoint.eqx"


def save(path: Path, config: Config, corpus_sha256: str, state: "State", step: int, record: dict[str, Any]) -> None:
    """Write the state after `step` steps. Raises ValueError if the folder cannot be written."""
    header = {"configuration": config.as_dict(), "corpus_sha256": corpus_sha256, "step": step, "record": record}
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        stream.write(json.dumps(header, allow_nan=False).encode() + b"\n")
        eqx.tree_serialise_leaves(stream, state)


def read_header(path: Path) -> dict[str, Any]:
    """The JSON line of a checkpoint. Raises ValueError naming the file if there is none or it is not one of ours."""
    try:
        with path.open("rb") as stream:
            header = json.loads(stream.readline())
    except OSError as error:
        raise ValueError(f"--out: no checkpoint at {path} ({error.strerror}); start one with train.") from None
    except ValueError:
        raise ValueError(f"--out: {path} is not a checkpoint; pass another folder.") from None
    if not isinstance(header, dict) or header.keys() != {"configuration", "corpus_sha256", "step", "record"}:
        raise ValueError(f"--out: {path} is not a checkpoint of this version; pass another folder.")
    return header


def load(path: Path, config: Config, corpus_sha256: str, like: "State") -> tuple["State", int, dict[str, Any]]:
    """State, step and record of a checkpoint of this very run. Raises ValueError if it is not, or damaged."""
    header = read_header(path)
    saved = renamed(header["configuration"])
    if saved != config.as_dict():
        changed = [key for key, value in config.as_dict().items() if saved.get(key) != value]
        raise ValueError(f"--out: {path} is of a run that differs in {', '.join(changed)}; pass another folder.")
    if header["corpus_sha256"] != corpus_sha256:
        raise ValueError(f"--out: {path} was trained on another text; pass its --corpus, or another folder.")
    try:
        with path.open("rb") as stream:
            stream.readline()
            state = eqx.tree_deserialise_leaves(stream, like)
    except (OSError, EOFError, ValueError, RuntimeError):
        raise ValueError(f"--out: {path} is damaged; delete it to start the run again.") from None
    return state, header["step"], header["record"]
