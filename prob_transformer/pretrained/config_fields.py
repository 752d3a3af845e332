"""Fields of a model's configuration, validated once by a schema: every later line can trust their types and ranges."""

import codecs
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

Count = Annotated[int, msgspec.Meta(ge=1)]
# GGUF can hold an infinity, and the decoders compute in float32.
Positive = Annotated[float, msgspec.Meta(gt=0, lt=1e38)]
Schema = TypeVar("Schema")


def require_supported(config: msgspec.Struct, **supported: tuple[Any, ...]) -> None:
    """Raises ValueError for the first of these fields whose value is none that the decoders here compute."""
    for name, values in supported.items():
        value = getattr(config, name)
        if value not in values:
            allowed = " or ".join(map(repr, values))
            raise ValueError(f"{name.replace('__', '.')} = {value!r}; only {allowed} is supported")


def read_json(path: Path, schema: type[Schema], remedy: str) -> Schema:
    """The JSON file at `path` as `schema`. Raises ValueError, ending in `remedy`, if it is missing or does not fit."""
    try:
        return msgspec.json.decode(path.read_bytes().removeprefix(codecs.BOM_UTF8), type=schema)
    except OSError as error:
        raise ValueError(f"model: {path} cannot be read ({error.strerror}); {remedy}.") from None
    except msgspec.ValidationError as error:
        raise ValueError(f"model: {path} is refused: {error}; {remedy}.") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"model: {path} is not JSON ({error}); {remedy}.") from None
