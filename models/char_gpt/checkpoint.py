"""One file a run, written whole or not at all: a line of JSON, then the arrays in NumPy's format, without pickle."""

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx

from models.char_gpt.config import Config, in_names_of_today
from prob_transformer.files import atomic_path

NAME = "checkpoint.eqx"
State = TypeVar("State")


def save(
    path: Path, configuration: dict[str, Any], corpus_sha256: str, state: Any, step: int, record: dict[str, Any]
) -> None:
    """Write the state after `step` steps. Raises ValueError if the folder cannot be written."""
    header = {"configuration": configuration, "corpus_sha256": corpus_sha256, "step": step, "record": record}
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        stream.write(json.dumps(header, allow_nan=False).encode() + b"\n")
        eqx.tree_serialise_leaves(stream, state)


def read_header(path: Path) -> dict[str, Any]:
    """The JSON line of a checkpoint, its configuration in the names of today.

    Raises ValueError naming the file if there is none or it is not one of ours.
    """
    try:
        with path.open("rb") as stream:
            header = json.loads(stream.readline())
    except OSError as error:
        raise ValueError(f"--out: no checkpoint at {path} ({error.strerror}); start one with train.") from None
    except ValueError:
        raise ValueError(f"--out: {path} is not a checkpoint; pass another folder.") from None
    if not isinstance(header, dict) or header.keys() != {"configuration", "corpus_sha256", "step", "record"}:
        raise ValueError(f"--out: {path} is not a checkpoint of this version; pass another folder.")
    return header | {"configuration": in_names_of_today(header["configuration"])}


def configuration_of(out: Path) -> Config:
    """The configuration of the run in `out`, whatever its loss. Raises ValueError if it has no checkpoint."""
    saved = read_header(out / NAME)["configuration"]
    return Config(**{field.name: saved[field.name] for field in dataclasses.fields(Config) if field.name in saved})


def load(
    path: Path, configuration: dict[str, Any] | None, corpus_sha256: str, like: State
) -> tuple[State, int, dict[str, Any]]:
    """State, step and record of a checkpoint of this very run, or of any run for None as configuration.

    Raises ValueError if it is of another run or text, or damaged.
    """
    header = read_header(path)
    saved = header["configuration"]
    expected = saved if configuration is None else configuration
    changed = sorted(key for key in expected | saved if (key, expected.get(key)) not in saved.items())
    if changed:
        raise ValueError(f"--out: {path} is of a run that differs in {', '.join(changed)}; pass another folder.")
    if header["corpus_sha256"] != corpus_sha256:
        raise ValueError(f"--out: {path} was trained on another text; pass its --corpus, or another folder.")
    try:
        with path.open("rb") as stream:
            stream.readline()
            return eqx.tree_deserialise_leaves(stream, like), header["step"], header["record"]
    except (OSError, EOFError, ValueError, RuntimeError):
        raise ValueError(f"--out: {path} is damaged; delete it to start the run again.") from None
