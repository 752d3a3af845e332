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
from prob_transformer.files import atomic_path, provenance, write_json
from prob_transformer.transformer import Generated, stream

_CHUNK = 32
# The fields of `Generated` as NumPy arrays.
Margins = dict[str, np.ndarray]
# What `stream` calls its arguments, and the option that each comes from.
_OPTIONS = {"temperature": "--temperature", "top_k": "--top-k", "noise_scale": "--noise-scale", "length": "--length"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--run", type=Path, required=True, help="folder of a trained run")
    parser.add_argument("--prompt", required=True, help="what the text begins with, at least one character")
    parser.add_argument("--length", type=int, default=500, help="characters to generate (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest (default: %(default)s)")
    parser.add_argument("--top-k", type=int, help="draw among the k likeliest characters (default: all)")
    parser.add_argument(
        "--noise-scale", type=float, default=0.0, help="noise on every input embedding (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    parser.add_argument("--posterior", type=Path, help="a file of laplace, whose draws are the weights (default: MAP)")
    parser.add_argument("--draws", type=int, help="texts, each by a draw of its own; for --posterior (default: 1)")
    parser.add_argument("--json", type=Path, help="a JSON file for text, log-probabilities and margins")
    parser.add_argument("--figure", type=Path, help="a PNG file for the margins along the text")


def main(options: argparse.Namespace, console: Console) -> None:
    """Do what the options ask for. Raises ValueError naming the option."""
    if options.seed < 0:
        raise ValueError(f"--seed: got {options.seed}; pass an integer of at least 0.")
    if options.posterior is None and options.draws is not None:
        raise ValueError(f"--draws: got {options.draws} without --posterior; pass a file that laplace wrote.")
    try:
        model, config, vocabulary = checkpoint.load_run(options.run)
        if options.posterior is None:
            models = [model]
        else:
            models = drawn_models(options.posterior, model, config, 1 if options.draws is None else options.draws)
        if options.figure is not None and len(models) > 1:
            raise ValueError(f"--figure: shows one text, got --draws {options.draws}; leave one of them out.")
        prompt = jnp.asarray(vocabulary.encode(options.prompt))
        key = jax.random.key(options.seed)
        given = {name: getattr(options, name) for name in ("temperature", "top_k", "noise_scale")}
        keys = [key] if options.posterior is None else jax.random.split(key, len(models))
        texts = [
            stream(model, prompt, options.length, key=key, chunk=_CHUNK, **given)
            for model, key in zip(models, keys, strict=True)
        ]
    except ValueError as error:
        argument, _, rest = str(error).partition(":")
        named = _OPTIONS | {"folder": "--run", "text": "--prompt", "prompt": "--prompt"}
        raise ValueError(f"{named.get(argument, argument)}:{rest}") from None
    records = []
    for number, chunks in enumerate(texts):
        if number:
            print()
        found = _printed(options.prompt, chunks, vocabulary)
        console.print(_summary(found))
        record = {name: values.tolist() for name, values in found.items()}
        records.append({"prompt": options.prompt, "text": vocabulary.decode(found["tokens"]), **record})
    if options.json is not None:
        asked = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        origin = {
            "provenance": provenance(options.seed, {**asked, "run_configuration": config.as_dict()}),
            "margins": "of the strict past, each head alone with identity values; axes: layer, head, character",
        }
        write_json(options.json, origin | (records[0] if options.posterior is None else {"draws": records}))
    if options.figure is not None:
        _draw(found, vocabulary.decode(found["tokens"]), options.figure)


def _printed(prompt: str, chunks: Iterator[Generated], vocabulary: Vocabulary) -> Margins:
    """What a text was generated with, after the text is printed as it is drawn."""
    print(prompt, end="", flush=True)
    parts = []
    for part in chunks:
        print(vocabulary.decode(np.asarray(part.tokens)), end="", flush=True)
        parts.append(part)
    print()
    arrays = (np.concatenate(of_one, axis=-1) for of_one in zip(*parts, strict=True))
    return dict(zip(Generated._fields, arrays, strict=True))


def _summary(found: Margins) -> str:
    """One sentence on the likelihood of the text and one on its margins."""
    determinant = found["sign"] * np.exp(found["log_det"])
    layer, head, position = np.unravel_index(np.abs(determinant).argmin(), determinant.shape)
    return (
        f"{len(found['tokens'])} characters, on average {-found['log_probs'].mean():.3f} nats each under the model. "
        f"det J <= 0 at {(determinant <= 0).mean():.2%} of the places; the smallest |det J| is "
        f"{abs(determinant[layer, head, position]):.3g}, in layer {layer}, head {head}, at character {position}; the "
        f"smallest sigma_min(J) is {found['conditioning'].min():.3g}."
    )


def _draw(found: Margins, text: str, path: Path) -> None:
    """The smallest |det J| and sigma_min(J) over heads of every layer along the text, as a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes: Any = figure.subplots(2, sharex=True)
    styles = ["-", "--", ":", "-."]
    for layer, (log_det, sign, conditioning) in enumerate(
        zip(found["log_det"], found["sign"], found["conditioning"], strict=True)
    ):
        line: dict[str, Any] = {"linestyle": styles[layer % 4], "linewidth": 1, "label": f"layer {layer}"}
        axes[0].semilogy(np.exp(log_det.min(0)), **line)
        axes[1].semilogy(conditioning.min(0), **line)
        negative = np.flatnonzero((sign <= 0).any(0))
        axes[0].plot(negative, np.exp(log_det.min(0))[negative], "k|", markersize=7)
    axes[0].set(ylabel="smallest |det J| of the heads", title="ticks: det J <= 0 in some head")
    axes[1].set(ylabel="smallest sigma_min(J)", xlabel="generated character")
    axes[0].legend(frameon=False)
    if len(text) <= 100:
        axes[1].set_xticks(range(len(text)), [repr(c)[1:-1] for c in text], fontsize=6, family="monospace")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
