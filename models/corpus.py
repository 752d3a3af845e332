"""Text as training, validation and test characters: fixed split by document, vocabulary from training alone.

A corpus is any UTF-8 text. Form feeds separate documents; of every ten documents, counted from 0 in file order,
number 4 goes to validation, number 9 to test and the others to training. Text without form feeds is cut by
characters instead, 90 % training, then 5 % validation, then 5 % test. The vocabulary holds the most frequent
characters of the training part that together cover 99.9 % of it; every other character is folded to one unknown.

WikiText-2 as published, a folder with wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens, keeps its own split;
its words are read as characters, "<unk>" and " @-@ " among them. Beside any corpus stands a second, different one that
nothing is trained on: the news of the gensim wheel, if that is installed, in the vocabulary of the training part.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from jaxtyping import Int

from models import wikipedia
from prob_transformer.files import read_user_text

COVERAGE = 0.999
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
SPLITS = ("train", "validation", "test")
WIKITEXT_FILES = {"train": "wiki.train.tokens", "validation": "wiki.valid.tokens", "test": "wiki.test.tokens"}
_LISTED = ", ".join(WIKITEXT_FILES.values())


class Vocabulary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The V characters that the ids 0 to V - 1 stand for; `unknown` is the one for every character not among them."""

    characters: tuple[str, ...]
    unknown: str = UNKNOWN

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str, *, fold: bool = False) -> Int[np.ndarray, " n"]:
        """The id of every character of the text, in int32.

        With `fold`, as a corpus is read, a character that the vocabulary lacks is folded to the unknown; without it
        such characters are a ValueError that names the first ten.
        """
        index = {character: i for i, character in enumerate(self.characters)}
        missing = [] if fold else [character for character in dict.fromkeys(text) if character not in index]
        if missing:
            named = ", ".join(map(repr, missing[:10])) + (", ..." if missing[10:] else "")
            raise ValueError(
                f"text: contains {named}, which the vocabulary lacks; leave such characters out (in Python, fold=True "
                "reads them as the unknown character)."
            )
        unknown = index[self.unknown]
        return np.fromiter((index.get(character, unknown) for character in text), np.int32, len(text))

    def decode(self, ids: Int[np.ndarray, " n"] | Iterable[int]) -> str:
        """The text of ids. Raises ValueError for an id that stands for no character."""
        given = [int(i) for i in ids]
        outside = next((i for i in given if not 0 <= i < len(self)), None)
        if outside is not None:
            raise ValueError(f"ids: contain {outside}; pass ids from 0 to {len(self) - 1}.")
        return "".join(self.characters[i] for i in given)


class Corpus(NamedTuple):
    """Encoded characters of each split, the vocabulary they index (the unknown first), and where they came from.

    `sha256` is that of the file, or of the files one after the other; the news, None without gensim, have their own.
    """

    path: str
    name: str
    sha256: str
    vocabulary: Vocabulary
    train: Int[np.ndarray, " train"]
    validation: Int[np.ndarray, " validation"]
    test: Int[np.ndarray, " test"]
    news: Int[np.ndarray, " news"] | None

    def name_of(self, part: str) -> str:
        """What "train", "validation", "test" or "news" is, in words."""
        return f"news ({wikipedia.NEWS_NAME} of gensim)" if part == "news" else f"{part} part of {self.name}"

    def describe(self) -> dict[str, object]:
        """Name, digest, characters and share of unknown ones of each split, vocabulary size, the news; for JSON."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "characters": {split: len(getattr(self, split)) for split in SPLITS},
            "unknown_share": {split: _unknown_share(getattr(self, split)) for split in SPLITS},
            "vocabulary_size": len(self.vocabulary),
            "news": None
            if self.news is None
            else {
                "name": self.name_of("news"),
                "sha256": wikipedia.NEWS_SHA256,
                "characters": len(self.news),
                "unknown_share": _unknown_share(self.news),
            },
        }


def _unknown_share(characters: Int[np.ndarray, " n"]) -> float:
    return float((characters == 0).mean())


def split_text(text: str) -> dict[str, str]:
    """Training, validation and test text by the rule of the module docstring."""
    documents = text.split(wikipedia.DOCUMENT_SEPARATOR)
    if len(documents) > 1:
        split_of = {4: "validation", 9: "test"}
        return {
            split: "\n\n".join(d for i, d in enumerate(documents) if split_of.get(i % 10, "train") == split)
            for split in SPLITS
        }
    first, second = int(0.9 * len(text)), int(0.95 * len(text))
    return {"train": text[:first], "validation": text[first:second], "test": text[second:]}


def build_vocabulary(training_text: str, coverage: float = COVERAGE) -> Vocabulary:
    """The unknown, then the most frequent characters until they cover `coverage` of the text, ties by code point."""
    ranked = sorted(Counter(training_text).items(), key=lambda item: (-item[1], item[0]))
    covered_before = accumulate((count for _, count in ranked), initial=0)
    kept = [c for (c, _), before in zip(ranked, covered_before, strict=False) if before < coverage * len(training_text)]
    return Vocabulary((UNKNOWN, *(character for character in kept if character != UNKNOWN)))


def _is_wikitext(source: Path) -> bool:
    """Whether a folder holds WikiText-2. Raises ValueError naming --corpus if it holds only some of its files."""
    missing = [name for name in WIKITEXT_FILES.values() if not (source / name).is_file()]
    if 0 < len(missing) < len(WIKITEXT_FILES):
        raise ValueError(
            f"--corpus: {source} has no {' and no '.join(missing)}; pass a folder with {_LISTED}, or one text file."
        )
    return not missing


def load(path: Path | str | None, shortest: int) -> Corpus:
    """The corpus at `path`, or the Wikipedia sample if None, every split holding at least `shortest` characters.

    A folder is read as WikiText-2. Raises ValueError naming --corpus for a file that is missing, empty, not UTF-8 or
    too short.
    """
    source = wikipedia.prepare() if path is None else Path(path)
    wikitext = _is_wikitext(source)
    files = [source / name for name in WIKITEXT_FILES.values()] if wikitext else [source]
    contents = [read_user_text("--corpus", file) for file in files]
    texts = [content.removeprefix("\ufeff").replace("\r\n", "\n") for content in contents]
    name = f"WikiText-2 as published ({_LISTED})" if wikitext else source.name
    parts = dict(zip(SPLITS, texts, strict=True)) if wikitext else split_text(texts[0])
    for split in SPLITS:
        if len(parts[split]) < shortest:
            raise ValueError(
                f"--corpus: {source} is too short, its {split} part has {len(parts[split])} characters and a context "
                f"needs {shortest}; pass a longer text or a smaller --context."
            )
    vocabulary = build_vocabulary(parts["train"])
    train, validation, test = (vocabulary.encode(parts[split], fold=True) for split in SPLITS)
    news_text = wikipedia.read_news()
    news = None if news_text is None else vocabulary.encode(news_text, fold=True)
    return Corpus(
        str(source),
        name,
        hashlib.sha256("".join(contents).encode()).hexdigest(),
        vocabulary,
        train,
        validation,
        test,
        news,
    )
