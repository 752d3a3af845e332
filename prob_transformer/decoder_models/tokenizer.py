"""Byte-pair tokenizers of pretrained models, from a model's own vocabulary and merges."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

# Embedding tables are padded to round numbers of rows; a tokenizer that leaves more than this unused is not its own.
_MOST_PADDING = 1024


def digits_then_bytes(tokens: Sequence[str], merges: Sequence[tuple[str, str]], special: Sequence[str]) -> Tokenizer:
    """The tokenizer of the SmolLM models: every digit apart, then byte-level without a prefix space, nothing added."""
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer.json at `path`. Raises ValueError if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"tokenizer: {path} cannot be read ({error}); pass a folder with a tokenizer.json.") from None
    try:
        return Tokenizer.from_str(text)
    # The library raises plain Exception for a file it cannot parse.
    except Exception as error:
        raise ValueError(
            f"tokenizer: {path} is not a tokenizer of the tokenizers library ({error}); save it anew."
        ) from None


def require_match(tokenizer: Tokenizer, rows: int) -> None:
    """Raises ValueError unless every token has an embedding and few embeddings are without a token."""
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if not rows - _MOST_PADDING <= largest + 1 <= rows:
        raise ValueError(
            f"tokenizer: numbers tokens up to {largest} but the model has {rows} embeddings; "
            "pass the tokenizer that belongs to the model."
        )


def encode(tokenizer: Tokenizer, text: str) -> Int[np.ndarray, " n"]:
    """Token numbers of a text, without any token added at its ends. Raises ValueError for an empty text."""
    numbers = np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
    if numbers.size == 0:
        raise ValueError("text: is empty; pass some text.")
    return numbers
