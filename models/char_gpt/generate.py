"""`python -m models.char_gpt generate`: text of a trained run, character by character, and the margins it was read at.

The text goes to standard output as it is drawn, the report on margins to standard error. `--json` and `--figure` write
log-probabilities and margins, det J and sigma_min(J) of every layer and head, at every generated character.

With `--posterior FILE --draws K` it writes K texts, an empty line between them, each by weights of one draw from the
Gaussian that `laplace` left in the file: K independent draws from the posterior predictive law of texts, up to that
approximation of the posterior.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from models.char_gpt import checkpoint
from models.char_gpt.posterior_draws import drawn_models
from models.corpus import Vocabulary
from prob_transformer.files import file_sha256, provenance, writing_to_standard_output
from prob_transformer.inspection.generated_text import (
    Found,
    add_options,
    in_names_of_options,
    require_options,
    summary,
    write_files,
)
from prob_transformer.transformer import stream
from prob_transformer.transformer.generation import Generated

_CHUNK = 32
_UNIT = "character"
# Arguments that are not called as the option that they come from.
_OPTIONS = {"noise_scale": "--noise-scale", "folder": "--run", "text": "--prompt", "transformer": "--run"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--run", type=Path, required=True, help="folder of a trained run")
    add_options(parser, _UNIT, length=500)
    parser.add_argument(
        "--noise-scale", type=float, default=0.0, help="noise on every input embedding (default: %(default)s)"
    )
    parser.add_argument("--posterior", type=Path, help="a file of laplace, whose draws are the weights (default: MAP)")
    parser.add_argument("--draws", type=int, help="texts, each by a draw of its own; for --posterior (default: 1)")


def main(options: argparse.Namespace, console: Console) -> None:
    """Do what the options ask for. Raises ValueError naming the option."""
    require_options(options, _UNIT)
    if options.posterior is None and options.draws is not None:
        raise ValueError(f"--draws: got {options.draws} without --posterior; pass a file that laplace wrote.")
    count = 1 if options.draws is None else options.draws
    if options.figure is not None and count > 1:
        raise ValueError(f"--figure: shows one text, got --draws {count}; leave one of them out.")
    key = jax.random.key(options.seed)
    with in_names_of_options(_OPTIONS):
        model, config, vocabulary = checkpoint.load_run(options.run)
        models, keys = [model], [key]
        if options.posterior is not None:
            of_weights = file_sha256(options.run / checkpoint.NAME)
            models = drawn_models(options.posterior, model, of_weights, count)
            keys = list(jax.random.split(key, count))
        prompt = jnp.asarray(vocabulary.encode(options.prompt))
        given = {name: getattr(options, name) for name in ("temperature", "top_k", "noise_scale")}
        streams = [
            stream(model, prompt, options.length, key=key, chunk=_CHUNK, **given)
            for model, key in zip(models, keys, strict=True)
        ]
    texts = []
    for number, chunks in enumerate(streams):
        if number:
            print()
        found = _printed(options.prompt, chunks, vocabulary)
        console.print(summary(found, _UNIT))
        texts.append((found, vocabulary.decode(found["tokens"])))

    def record_of_origin(asked: dict[str, Any]) -> dict[str, Any]:
        return {"provenance": provenance(options.seed, {**asked, "run_configuration": config.as_dict()})}

    write_files(options, texts, _UNIT, record_of_origin, are_draws=options.posterior is not None)


def _printed(prompt: str, chunks: Iterator[Generated], vocabulary: Vocabulary) -> Found:
    """What a text was generated with, after the text is printed as it is drawn."""
    parts = []
    with in_names_of_options(_OPTIONS), writing_to_standard_output():
        print(prompt, end="", flush=True)
        for part in chunks:
            print(vocabulary.decode(np.asarray(part.tokens)), end="", flush=True)
            parts.append(part)
        print()
    arrays = (np.concatenate(of_one, axis=-1) for of_one in zip(*parts, strict=True))
    return dict(zip(Generated._fields, arrays, strict=True))
