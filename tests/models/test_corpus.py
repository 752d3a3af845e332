import hashlib

import numpy as np
import pytest

from models import corpus, wikipedia


def test_documents_are_split_by_their_number():
    documents = [f"document {i} " + "x" * i for i in range(25)]
    parts = corpus.split_text("\f".join(documents))
    assert parts["validation"] == "\n\n".join(documents[i] for i in (4, 14, 24))
    assert parts["test"] == "\n\n".join(documents[i] for i in (9, 19))
    for i in set(range(25)) - {4, 14, 24, 9, 19}:
        assert documents[i] in parts["train"].split("\n\n")


def test_text_without_documents_is_cut_by_characters():
    text = "".join(chr(ord("a") + i % 26) for i in range(1000))
    parts = corpus.split_text(text)
    assert (len(parts["train"]), len(parts["validation"]), len(parts["test"])) == (900, 50, 50)
    assert parts["train"] + parts["validation"] + parts["test"] == text


def test_the_vocabulary_covers_999_in_1000_and_folds_the_rest():
    text = "a" * 900 + "b" * 99 + "c"
    vocabulary = corpus.build_vocabulary(text)
    assert vocabulary.characters == (corpus.UNKNOWN, "a", "b")
    np.testing.assert_array_equal(vocabulary.encode("abcé", fold=True), [1, 2, 0, 0])


def test_a_vocabulary_is_read_both_ways_and_names_what_it_lacks():
    vocabulary = corpus.Vocabulary(("b", "?", "a"), unknown="?")
    ids = vocabulary.encode("abba")
    np.testing.assert_array_equal(ids, [2, 0, 0, 2])
    assert ids.dtype == np.int32
    assert vocabulary.decode(ids) == "abba"
    assert vocabulary.decode(vocabulary.encode("abcé", fold=True)) == "ab??"
    assert vocabulary.encode("").shape == (0,)
    assert vocabulary.decode(np.array([], np.int32)) == ""
    with pytest.raises(
        ValueError, match=r"text: contains 'é', 'c', which the vocabulary lacks; leave such characters out \(in Python"
    ):
        vocabulary.encode("abéc")
    with pytest.raises(ValueError, match=r"contains 'c', .*, 'l', \.\.\., which"):
        vocabulary.encode("abcdefghijklm")
    for outside in (-1, 3):
        with pytest.raises(ValueError, match=rf"ids: contain {outside}; pass ids from 0 to 2\."):
            vocabulary.decode([0, outside])


def test_the_vocabulary_knows_nothing_of_validation_and_test(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("ab" * 450 + "z" * 100, encoding="utf-8")
    loaded = corpus.load(path, 10)
    assert set(loaded.vocabulary.characters) == {corpus.UNKNOWN, "a", "b"}
    assert (loaded.validation == 0).all()
    assert loaded.train.dtype == np.int32
    assert loaded.describe()["characters"] == {"train": 900, "validation": 50, "test": 50}


def test_a_byte_order_mark_and_windows_line_ends_are_not_characters(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"ab\r\n" * 300)
    assert set(corpus.load(path, 10).vocabulary.characters) == {corpus.UNKNOWN, "a", "b", "\n"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("a folder", "cannot be read"),
        (b"", "is empty"),
        (b"  \n ", "is empty"),
        (b"abc\xff\xfe", r"is not UTF-8 \(byte 3\); convert it"),
        (b"\xef\xbb\xbfabc\xff", r"is not UTF-8 \(byte 6\); convert it"),
        (b"abc" * 30, "is too short, its validation part has 4 characters and a context needs 65"),
    ],
)
def test_bad_text_is_refused_with_a_remedy(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content == "a folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"--corpus: .*{message}"):
        corpus.load(path, 65)


WIKITEXT = {"train": "wiki.train.tokens", "valid": "wiki.valid.tokens", "test": "wiki.test.tokens"}


def write_wikitext(folder, *names):
    for name in names:
        (folder / WIKITEXT[name]).write_text(f" = {name} = \n <unk> @-@ " * 30, encoding="utf-8")


def test_wikitext_as_published_keeps_its_own_split(tmp_path):
    write_wikitext(tmp_path, *WIKITEXT)
    loaded = corpus.load(tmp_path, 65)
    described = loaded.describe()
    assert described["name"] == "WikiText-2 as published (wiki.train.tokens, wiki.valid.tokens, wiki.test.tokens)"
    contents = [(tmp_path / name).read_bytes() for name in WIKITEXT.values()]
    assert described["sha256"] == hashlib.sha256(b"".join(contents)).hexdigest()
    train, validation, test = (content.decode() for content in contents)
    assert loaded.vocabulary == corpus.build_vocabulary(train)
    for part, text in (("train", train), ("validation", validation), ("test", test)):
        np.testing.assert_array_equal(getattr(loaded, part), loaded.vocabulary.encode(text, fold=True))
    # "d", "l" and "v" stand in no training text.
    assert described["unknown_share"]["validation"] == sum(c in "vld" for c in "valid") / len(
        " = valid =  <unk> @-@ \n"
    )


@pytest.mark.parametrize(
    ("there", "missing"),
    [(("train", "test"), "wiki.valid.tokens"), (("valid",), "wiki.train.tokens and no wiki.test.tokens")],
)
def test_a_folder_with_a_part_of_wikitext_is_refused(tmp_path, there, missing):
    write_wikitext(tmp_path, *there)
    with pytest.raises(ValueError, match=rf"--corpus: .* has no {missing}; pass a folder with wiki.train.tokens, "):
        corpus.load(tmp_path, 65)


def test_news_are_read_in_the_vocabulary_of_the_training_text_alone(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the news " * 100, encoding="utf-8")
    loaded = corpus.load(path, 10)
    assert set(loaded.vocabulary.characters) == {corpus.UNKNOWN, *"the news "}
    text = wikipedia.read_news()
    assert text.startswith("Hundreds of people have been forced to vacate their homes")
    assert text.count("\n\n") == 299
    np.testing.assert_array_equal(loaded.news, loaded.vocabulary.encode(text, fold=True))
    news = loaded.describe()["news"]
    assert news["characters"] == len(text)
    assert news["unknown_share"] == sum(c not in "the news " for c in text) / len(text)
    assert "lee_background.cor" in news["name"]


def test_without_gensim_there_are_no_news_and_a_foreign_file_is_named(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text("the news " * 100, encoding="utf-8")

    with monkeypatch.context() as patch:
        patch.setattr(wikipedia, "find_spec", lambda name: None)
        loaded = corpus.load(path, 10)
        assert loaded.news is None
        assert loaded.describe()["news"] is None
    monkeypatch.setattr(wikipedia, "NEWS_SHA256", "0" * 64)
    with pytest.raises(
        ValueError, match=r"lee_background.cor is cut off or not the file this was written for; .* uninstall gensim"
    ):
        corpus.load(path, 10)
