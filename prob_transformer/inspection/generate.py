"""`prob-transformer generate`: text of a pretrained decoder, token by token, and the margins it was read at.

The text goes to standard output as it is drawn. The margins follow from one pass over the finished text, and the report
on them goes to standard error.
"""

import argparse
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from tqdm import tqdm

from prob_transformer._extras import require
from prob_transformer.files import provenance, writing_to_standard_output
from prob_transformer.inspection.generated_text import (
    add_options,
    in_names_of_options,
    margins_of_text,
    require_options,
    summary,
    write_files,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_UNIT = "token"
# What a decoder writes for a character of which some bytes are missing.
_UNFINISHED = "\ufffd"


def add_arguments(parser: argparse.ArgumentParser, model_help: str) -> None:
    """The options of the command."""
    parser.add_argument("--model", required=True, help=model_help)
    add_options(parser, _UNIT, length=100)


def _prompt_tokens(tokenizer: "Tokenizer", prompt: str) -> list[int]:
    """The prompt's tokens, with those that the tokenizer adds before a text and without those that it adds after it."""
    # The library raises plain Exception, as for a character that the vocabulary lacks where no token stands for it.
    try:
        encoding = tokenizer.encode(prompt)
    except Exception as error:
        raise ValueError(f"--prompt: the model's tokenizer refuses it ({error}); pass another one.") from None
    own = np.flatnonzero(np.asarray(encoding.special_tokens_mask) == 0)
    if own.size == 0:
        raise ValueError("--prompt: has no token; pass another one.")
    return encoding.ids[: own[-1] + 1]


class _Pieces:
    """The text of each token so far, "" where a character is not finished yet."""

    def __init__(self, tokenizer: "Tokenizer", prompt: list[int]):
        self._decode = partial(tokenizer.decode, skip_special_tokens=False)
        self._tokens, self._written = list(prompt), len(self._decode(prompt))
        self.pieces: list[str] = []

    def add(self, token: int, is_last: bool) -> str:
        """The text of one more token."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        piece = "" if text.endswith(_UNFINISHED) and not is_last else text[self._written :]
        self._written += len(piece)
        self.pieces.append(piece)
        return piece


def run(options: argparse.Namespace, command: str) -> None:
    """Do what the options ask for. Raises ValueError naming the option, and MissingExtraError."""
    require("inspect", "gguf", "msgspec", "safetensors", "tokenizers")
    from prob_transformer.pretrained.generation import continue_texts
    from prob_transformer.pretrained.load import load_pretrained

    require_options(options, _UNIT)
    with in_names_of_options({"model": "--model"}):
        model = load_pretrained(options.model)
    prompt = _prompt_tokens(model.tokenizer, options.prompt)
    given = {"temperature": options.temperature, "top_k": options.top_k}
    with in_names_of_options({"prompts": "--prompt", "tokens": "--prompt"}):
        steps = continue_texts(
            model.decoder, np.array([prompt]), options.length, keys=jax.random.key(options.seed)[None], **given
        )
    written, drawn = _Pieces(model.tokenizer, prompt), []
    with in_names_of_options({"decoder": "--model"}), writing_to_standard_output():
        print(options.prompt, end="", flush=True)
        for step in steps:
            drawn.append((int(step.tokens[0]), float(step.log_probs[0])))
            print(written.add(drawn[-1][0], len(drawn) == options.length), end="", flush=True)
        print()
    tokens, log_probs = (np.array(column) for column in zip(*drawn, strict=True))
    whole = np.append(prompt, tokens)
    # The bar is for a terminal alone.
    with tqdm(total=len(model.decoder.blocks), desc="margins of layers", leave=False, disable=None) as bar:
        positions = np.arange(len(prompt) - 1, len(whole) - 1)
        margins = margins_of_text(model.decoder.layers(whole), positions, bar.update)
    found = {"tokens": tokens, "log_probs": log_probs, **margins}
    print(summary(found, _UNIT), file=sys.stderr)

    def record_of_origin(asked: dict[str, Any]) -> dict[str, Any]:
        origin = {"provenance": provenance(options.seed, asked, command)}
        of_model = {"model": model.name, "model_sha256": model.sha256}
        return {**origin, **of_model, "prompt_tokens": prompt, "pieces": written.pieces}

    write_files(options, [(found, written.pieces)], _UNIT, record_of_origin)
