"""English Wikipedia text by pip alone: the sample of articles that the gensim 4.4.0 wheel carries, markup stripped.

`python -m models.wikipedia --out data/wikipedia.txt` writes one UTF-8 file, a form feed between articles, each
starting with its title on a line of its own. The text is under CC BY-SA; it is not WikiText-2, and results on it are
not to be compared with published WikiText-2 numbers. gensim is never imported, only its file is read.
"""

import argparse
import bz2
import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import mwparserfromhell
from mwparserfromhell.nodes import Node, Tag, Wikilink
from tqdm import tqdm

from models.cli import run
from prob_transformer.files import file_sha256, wheel_file, write_json, write_text

DUMP_NAME = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
DUMP_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
# News of Australia, one document a line, in the same wheel: text of another kind to evaluate on.
NEWS_NAME = "lee_background.cor"
NEWS_SHA256 = "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb"
DEFAULT_PATH = Path("data/wikipedia.txt")
DOCUMENT_SEPARATOR = "\f"
_REMEDY = "install the corpus extra (gensim==4.4.0), or "
# Raised whenever cleaning changes, so that a text cleaned by older rules is made again.
CLEANING_VERSION = 1

_DROPPED_TAGS = {"ref", "references", "math", "gallery", "table", "timeline", "score", "syntaxhighlight", "imagemap"}
# Pictures, categories and links to the same article in other languages print something that is not prose; a leading
# colon ("[[:Category:Trees]]") makes an ordinary link of them, which is kept.
_DROPPED_LINK = re.compile(r"\s*(file|image|category|[a-z]{2,3}(-[a-z]+)*|simple)\s*:", re.IGNORECASE)
# Comments and references go before parsing: unbalanced markup beside them makes the parser take them for text.
_UNPARSED = re.compile(r"<!--.*?-->|<ref\b[^<>]*/>|<ref\b[^<>]*>.*?</ref\s*>", re.DOTALL | re.IGNORECASE)


class Article(NamedTuple):
    """A title and its wikitext or cleaned text."""

    title: str
    text: str


def dump_path() -> Path:
    """Where the installed gensim wheel keeps the dump. Raises ValueError if it is missing or not the known file."""
    return wheel_file("corpus", "gensim", DUMP_NAME, DUMP_SHA256, f"{_REMEDY}pass --corpus with a text of your own")


def read_news() -> str | None:
    """The news in the wheel, an empty line between documents; None where gensim is not installed.

    Raises ValueError if gensim is there and its file is missing or not the known one.
    """
    if find_spec("gensim") is None:
        return None
    path = wheel_file("corpus", "gensim", NEWS_NAME, NEWS_SHA256, f"{_REMEDY}uninstall gensim to go without news")
    return "\n\n".join(path.read_text(encoding="utf-8").strip("\n").split("\n"))


def read_dump(path: Path) -> Iterator[Article]:
    """The wikitext of every page of the article namespace that is not a redirect, in the order of the dump."""
    with bz2.open(path) as stream:
        for _, element in ElementTree.iterparse(stream):
            namespace, _, tag = element.tag.rpartition("}")
            if tag != "page":
                continue
            prefix = namespace + "}" if namespace else ""
            if element.findtext(f"{prefix}ns") == "0" and element.find(f"{prefix}redirect") is None:
                title = element.findtext(f"{prefix}title") or ""
                yield Article(title, element.findtext(f"{prefix}revision/{prefix}text") or "")
            element.clear()


def _is_dropped(node: Node) -> bool:
    if isinstance(node, Tag):
        return str(node.tag).strip().lower() in _DROPPED_TAGS
    return isinstance(node, Wikilink) and _DROPPED_LINK.match(str(node.title)) is not None


def clean(wikitext: str) -> str:
    """Plain text of an article: no references, comments, formulas, galleries, tables, templates, pictures or markup."""
    code = mwparserfromhell.parse(_UNPARSED.sub("", wikitext))
    for node in code.filter(matches=_is_dropped):
        # Parents come before what they hold, and a node that left with its parent is no longer found.
        with contextlib.suppress(ValueError):
            code.remove(node)
    text = code.strip_code(normalize=True, collapse=True)
    # Behavioural switches such as __NOTOC__ are not markup to the parser.
    text = re.sub(r"__[A-Z]+__", "", text).replace(DOCUMENT_SEPARATOR, " ")
    lines = (re.sub(r"[ \t\xa0]+", " ", line).strip() for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def prepare(out: Path = DEFAULT_PATH) -> Path:
    """Write the cleaned sample to `out` unless it is there already; return its path. Raises as `dump_path`."""
    out = Path(out)
    stamp = out.with_suffix(".json")
    made_from = {"dump_sha256": DUMP_SHA256, "cleaning_version": CLEANING_VERSION}
    # Without a stamp, or with a damaged one, which vouches for nothing, the text is made again.
    with contextlib.suppress(OSError, ValueError):
        if json.loads(stamp.read_text(encoding="utf-8")) == {**made_from, "text_sha256": file_sha256(out)}:
            return out
    articles = tqdm(list(read_dump(dump_path())), desc="cleaning Wikipedia articles", unit="article")
    text = DOCUMENT_SEPARATOR.join(f"{article.title}\n{clean(article.text)}" for article in articles)
    write_text(out, text)
    write_json(stamp, {**made_from, "text_sha256": hashlib.sha256(text.encode()).hexdigest()})
    return out


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m models.wikipedia", description="Write the Wikipedia sample.")
    parser.add_argument("--out", type=Path, default=DEFAULT_PATH, help="text file to write (default: %(default)s)")
    arguments = parser.parse_args(argv)
    path = prepare(arguments.out)
    text = path.read_text(encoding="utf-8")
    print(f"{path}: {text.count(DOCUMENT_SEPARATOR) + 1} articles, {len(text):,} characters")


if __name__ == "__main__":
    run(main)
