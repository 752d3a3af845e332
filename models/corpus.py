"""Text as training, validation and test characters: fixed split by document, vocabulary from training alone.

A corpus is any UTF-8 text. Form feeds separate documents; of every ten documents, counted from 0 in file order,
number 4 goes to validation, number 9 to test and the others to training. Text without form feeds is cut by
characters instead, 90 % training, then 5 % validation, then 5 % test. The vocabulary holds the most frequent
characters of the training part that together cover 99.9 % of it; every other character is folded to one unknown.
"""

import hashlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from models import wikipedia

COVERAGE = 0.999
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
SPLITS = ("train", "validation", "test")


class Corpus(NamedTuple):
    """Encoded characters of each split, the vocabulary they index (the unknown first), and where they came from."""

    path: str
    sha256: str
    vocabulary: tuple[str, ...]
    train: Int[np.ndarray, " train"]
    validation: Int[np.ndarray, " validation"]
    test: Int[np.ndarray, " test"]

    def describe(self) -> dict[str, object]:
        """File name, digest, characters of each split and vocabulary size, ready for JSON."""
        return {
            "name": Path(self.path).name,
            "sha256": self.sha256,
            "characters": {split: len(getattr(self, split)) for split in SPLITS},
            "vocabulary_size": len(self.vocabulary),
        }


def split_text(text: str) -> dict[str, str]:
    """Training, validation and test text by the rule of the module docstring."""
    documents = text.split(wikipedia.DOCUMENT_SEPARATOR)
    if len(documents) > 1:
        number = {"validation": 4, "test": 9}
        chosen = {split: [d for i, d in enumerate(documents) if i % 10 == n] for split, n in number.items()}
        chosen["train"] = [d for i, d in enumerate(documents) if i % 10 not in number.values()]
        return {split: "\n\n".join(chosen[split]) for split in SPLITS}
    first, second = int(0.9 * len(text)), int(0.95 * len(text))
    return {"train": text[:first], "validation": text[first:second], "test": text[second:]}


def build_vocabulary(training_text: str, coverage: float = COVERAGE) -> tuple[str, ...]:
    """The unknown, then the most frequent characters until they cover `coverage` of the text, ties by code point."""
    needed = coverage * len(training_text)
    kept, covered = [], 0
    for character, count in sorted(Counter(training_text).items(), key=lambda item: (-item[1], item[0])):
        if covered >= needed:
            break
        kept.append(character)
        covered += count
    return (UNKNOWN, *(character for character in kept if character != UNKNOWN))


def encode(text: str, vocabulary: tuple[str, ...]) -> Int[np.ndarray, " n"]:
    """Index of every character in the vocabulary, 0 for those not in it."""
    index = {character: i for i, character in enumerate(vocabulary)}
    return np.fromiter((index.get(character, 0) for character in text), np.int32, len(text))


def load(path: Path | str | None, shortest: int) -> Corpus:
    """The corpus at `path`, or the Wikipedia sample if None, every split holding at least `shortest` characters.

    Raises ValueError naming --corpus for a file that is missing, empty, not UTF-8 or too short.
    """
    source = wikipedia.prepare() if path is None else Path(path)
    try:
        data = source.read_bytes()
    except OSError as error:
        raise ValueError(f"--corpus: {source} cannot be read ({error.strerror}); pass a UTF-8 text file.") from None
    try:
        # Not "utf-8-sig", which would count the offset of a bad byte from behind the byte order mark.
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--corpus: {source} is not UTF-8 (byte {error.start}); convert it, for example with iconv -t utf-8."
        ) from None
    text = text.replace("\r\n", "\n")
    if not text.strip():
        raise ValueError(f"--corpus: {source} is empty; pass a UTF-8 text file.")
    parts = split_text(text)
    for split in SPLITS:
        if len(parts[split]) < shortest:
            raise ValueError(
                f"--corpus: {source} is too short, its {split} part has {len(parts[split])} characters and a context "
                f"needs {shortest}; pass a longer text or a smaller --context."
            )
    vocabulary = build_vocabulary(parts["train"])
    train, validation, test = (encode(parts[split], vocabulary) for split in SPLITS)
    return Corpus(str(source), hashlib.sha256(data).hexdigest(), vocabulary, train, validation, test)
