"""`python -m models.char_gpt generate`: text of a trained run, character by character, and the margins it was read at.

The text goes to standard output as it is drawn, the report on margins to standard error. `--json` and `--figure` write
log-probabilities and margins, det J and sigma_min(J) of every layer and head, at every generated character.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from models.char_gpt import checkpoint
from prob_transformer.files import provenance
from prob_transformer.inspection.generated_text import (
    add_options,
    in_names_of_options,
    require_options,
    summary,
    write_files,
)
from prob_transformer.transformer import Generated, stream

_CHUNK = 32
_UNIT = "character"
# Arguments that are not called as the option that they come from.
_OPTIONS = {"noise_scale": "--noise-scale", "folder": "--run", "text": "--prompt"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--run", type=Path, required=True, help="folder of a trained run")
    add_options(parser, _UNIT, length=500)
    parser.add_argument(
        "--noise-scale", type=float, default=0.0, help="noise on every input embedding (default: %(default)s)"
    )


def main(options: argparse.Namespace, console: Console) -> None:
    """Do what the options ask for. Raises ValueError naming the option."""
    require_options(options)
    try:
        model, config, vocabulary = checkpoint.load_run(options.run)
        prompt = jnp.asarray(vocabulary.encode(options.prompt))
        given = {name: getattr(options, name) for name in ("temperature", "top_k", "noise_scale")}
        chunks = stream(model, prompt, options.length, key=jax.random.key(options.seed), chunk=_CHUNK, **given)
    except ValueError as error:
        raise in_names_of_options(error, _OPTIONS) from None
    print(options.prompt, end="", flush=True)
    parts = []
    for part in chunks:
        print(vocabulary.decode(np.asarray(part.tokens)), end="", flush=True)
        parts.append(part)
    print()
    arrays = (np.concatenate(of_one, axis=-1) for of_one in zip(*parts, strict=True))
    found = dict(zip(Generated._fields, arrays, strict=True))
    console.print(summary(found, _UNIT))

    def record_of_origin(asked: dict[str, Any]) -> dict[str, Any]:
        return {"provenance": provenance(options.seed, {**asked, "run_configuration": config.as_dict()})}

    write_files(options, found, vocabulary.decode(found["tokens"]), _UNIT, record_of_origin)
