"""The tokenizer of a Hugging Face folder, and what any tokenizer must have in common with its model."""

from pathlib import Path

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer.json at `path`, cutting whole texts and always alike: what was saved of truncation, padding and
    dropout while the model was trained is switched off. Raises ValueError if it cannot be read.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    # The library raises plain Exception, for a file that is missing as for one that it cannot parse.
    except Exception as error:
        raise ValueError(
            f"tokenizer: {path} cannot be read as one of the tokenizers library ({error}); save it there anew."
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None
    return tokenizer


def require_match(tokenizer: Tokenizer, rows: int) -> None:
    """Raises ValueError unless every token has an embedding and at least half of the embeddings have a token.

    Embedding tables are padded to round numbers of rows, some by thousands.
    """
    count = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if not rows <= 2 * count <= 2 * rows:
        raise ValueError(
            f"tokenizer: has {count} tokens but the model {rows} embeddings, fewer than the tokens or more than "
            "twice as many; pass the tokenizer that belongs to the model."
        )


def encode(tokenizer: Tokenizer, text: str) -> Int[np.ndarray, " n"]:
    """Token numbers of a text, with those that the tokenizer adds at its ends. Raises ValueError for an empty text."""
    numbers = np.asarray(tokenizer.encode(text).ids, np.int32)
    if numbers.size == 0 or not text:
        raise ValueError("text: is empty; pass some text.")
    return numbers
