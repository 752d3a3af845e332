import numpy as np
import pytest

from models import corpus


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
    assert vocabulary == (corpus.UNKNOWN, "a", "b")
    np.testing.assert_array_equal(corpus.encode("abcé", vocabulary), [1, 2, 0, 0])


def test_the_vocabulary_knows_nothing_of_validation_and_test(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("ab" * 450 + "z" * 100, encoding="utf-8")
    loaded = corpus.load(path, 10)
    assert set(loaded.vocabulary) == {corpus.UNKNOWN, "a", "b"}
    assert (loaded.validation == 0).all()
    assert loaded.train.dtype == np.int32
    assert loaded.describe()["characters"] == {"train": 900, "validation": 50, "test": 50}


def test_a_byte_order_mark_and_windows_line_ends_are_not_characters(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"ab\r\n" * 300)
    assert set(corpus.load(path, 10).vocabulary) == {corpus.UNKNOWN, "a", "b", "\n"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "is empty"),
        (b"  \n ", "is empty"),
        (b"abc\xff\xfe", r"is not UTF-8 \(byte 3\); convert it"),
        (b"\xef\xbb\xbfabc\xff", r"is not UTF-8 \(byte 6\); convert it"),
        (b"abc" * 30, "is too short, its validation part has 4 characters and a context needs 65"),
    ],
)
def test_bad_text_is_refused_with_a_remedy(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"--corpus: .*{message}"):
        corpus.load(path, 65)


def test_a_folder_is_not_a_corpus(tmp_path):
    with pytest.raises(ValueError, match=r"--corpus: .* cannot be read"):
        corpus.load(tmp_path, 65)
