"""One file a run, written whole or not at all: a line with a checksum, a line of JSON, then arrays in NumPy's format.

The checksum is the SHA-256 of everything after its own line. Versions before 0.2 wrote neither that line nor the
vocabulary and the tokeniser: their files begin with the line of JSON, and nothing is pickled in either.
"""

import dataclasses
import hashlib
import io
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast, get_type_hints

import equinox as eqx
import jax
import msgspec

from models.char_gpt.config import Config, in_names_of_today
from models.char_gpt.training_record import Record, new_record
from models.corpus import Corpus, Vocabulary
from prob_transformer.files import atomic_path
from prob_transformer.transformer.network import Transformer

NAME, FORMAT = "checkpoint.eqx", 2
State = TypeVar("State")


def _schema(of: type, *optional: tuple[str, Any, Any]) -> type[msgspec.Struct]:
    """A schema that requires the fields of a dataclass or TypedDict, and has no others but the optional ones."""
    fields: list[Any] = [*get_type_hints(of).items(), *optional]
    return msgspec.defstruct(f"_{of.__name__}", fields, forbid_unknown_fields=True)


# The study adds its method and strength to a configuration.
_CONFIGURATION = _schema(Config, ("method", str | None, None), ("strength", float | None, None))
_RECORD = _schema(Record)


class _Format(msgspec.Struct):
    format: int


class _EarlierHeader(msgspec.Struct, forbid_unknown_fields=True):
    configuration: dict[str, Any]
    corpus_sha256: str
    step: int
    record: dict[str, Any]


class Header(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The line of JSON; vocabulary and tokeniser are None in a file of an earlier version alone."""

    format: int = FORMAT
    configuration: dict[str, Any]
    corpus_sha256: str
    step: int
    record: dict[str, Any]
    vocabulary: Vocabulary | None
    tokeniser: Literal["characters"] | None

    def __post_init__(self) -> None:
        # Both for the ValueError of what does not fit.
        msgspec.convert(self.record, _RECORD)
        _ = self.config

    @property
    def config(self) -> Config:
        """The configuration without the study's method and strength."""
        fields = msgspec.convert(self.configuration, _CONFIGURATION)
        return Config(**{field.name: getattr(fields, field.name) for field in dataclasses.fields(Config)})


class Run(NamedTuple):
    """What it takes to use a trained model: its weights, its configuration and its vocabulary."""

    model: Transformer
    config: Config
    vocabulary: Vocabulary


def _checksum(content: bytes) -> bytes:
    return f"sha256 {hashlib.sha256(content).hexdigest()}".encode()


def save(path: Path, configuration: dict[str, Any], corpus: Corpus, state: Any, step: int, record: Record) -> None:
    """Write the state after `step` steps. Raises ValueError if the folder cannot be written."""
    header = Header(
        configuration=configuration,
        corpus_sha256=corpus.sha256,
        step=step,
        record={**record},
        vocabulary=corpus.vocabulary,
        tokeniser="characters",
    )
    content = io.BytesIO()
    content.write(json.dumps(msgspec.to_builtins(header), allow_nan=False).encode() + b"\n")
    eqx.tree_serialise_leaves(content, state)
    with atomic_path(path) as temporary:
        temporary.write_bytes(_checksum(content.getvalue()) + b"\n" + content.getvalue())


def _in_format_of_today(line: bytes) -> dict[str, Any]:
    """The header of an earlier version's file; what that version did not know is as it is by default."""
    found = msgspec.to_builtins(msgspec.json.decode(line, type=_EarlierHeader))
    configuration = Config().as_dict() | in_names_of_today(found["configuration"])
    added = {"format": 1, "vocabulary": None, "tokeniser": None}
    return found | added | {"configuration": configuration, "record": {**new_record(), **found["record"]}}


def _read(path: Path, argument: str) -> tuple[Header, bytes]:
    """Header and arrays of a checkpoint. Raises ValueError, naming `argument` and the file, if it is not one."""
    try:
        first, _, rest = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise ValueError(
            f"{argument}: no checkpoint at {path} ({error.strerror}); start one with train, or pass another folder."
        ) from None
    is_earlier = first.startswith(b"{")
    if not is_earlier and first != _checksum(rest):
        raise _damaged(path, argument)
    line, arrays = (first, rest) if is_earlier else rest.split(b"\n", 1)
    try:
        if not is_earlier and (written := msgspec.json.decode(line, type=_Format).format) > FORMAT:
            raise ValueError(f"its format is {written}, and the newest that this version reads is {FORMAT}")
        fields = _in_format_of_today(line) if is_earlier else msgspec.json.decode(line)
        return msgspec.convert(fields, Header), arrays
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{argument}: {path} is not a checkpoint of this version: {str(error).rstrip('.')}; use the version that "
            "wrote it, or pass another folder."
        ) from None


def _damaged(path: Path, argument: str) -> ValueError:
    return ValueError(
        f"{argument}: {path} is damaged or is not a checkpoint; restore a copy of it, delete it to start the run "
        "again, or pass another folder."
    )


def _deserialised(arrays: bytes, like: State, path: Path, argument: str) -> State:
    try:
        return eqx.tree_deserialise_leaves(io.BytesIO(arrays), like)
    except (OSError, EOFError, ValueError, RuntimeError):
        raise _damaged(path, argument) from None


def read_header(path: Path, argument: str = "--out") -> Header:
    """The header of a checkpoint, its configuration in the names of today.

    Raises ValueError, naming `argument` and the file, if there is none, or if it is damaged or not one of ours.
    """
    return _read(path, argument)[0]


def load(
    path: Path, configuration: dict[str, Any] | None, corpus_sha256: str, like: State, argument: str = "--out"
) -> tuple[State, int, Record]:
    """State, step and record of a checkpoint of this very run, or of any run for None as configuration.

    Raises ValueError, naming `argument` and the file, if it is of another run or text, or damaged.
    """
    header, arrays = _read(path, argument)
    saved = header.configuration
    expected = saved if configuration is None else configuration
    changed = sorted(key for key in expected | saved if (key, expected.get(key)) not in saved.items())
    if changed:
        raise ValueError(f"{argument}: {path} is of a run that differs in {', '.join(changed)}; pass another folder.")
    if header.corpus_sha256 != corpus_sha256:
        raise ValueError(f"{argument}: {path} was trained on another text; pass its --corpus, or another folder.")
    return _deserialised(arrays, like, path, argument), header.step, cast(Record, header.record)


def load_run(folder: Path | str) -> Run:
    """The trained model of a run's folder, its configuration and its vocabulary; no corpus is needed.

    Raises ValueError naming the file if there is none, if it is damaged, or if an earlier version wrote it, which wrote
    no vocabulary.
    """
    path = Path(folder) / NAME
    header, arrays = _read(path, "folder")
    if header.vocabulary is None:
        raise ValueError(
            f"folder: {path} has no vocabulary, because an earlier version wrote it; resume the run with its corpus, "
            "which adds the vocabulary."
        )
    like = eqx.filter_eval_shape(Transformer, jax.random.key(0), header.config.transformer(len(header.vocabulary)))
    # The model stands first in a state, so what follows, the optimiser's part, is left unread.
    return Run(_deserialised(arrays, like, path, "folder"), header.config, header.vocabulary)
