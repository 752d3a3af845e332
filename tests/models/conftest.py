import pytest

from tests.helpers.words import write_words


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of words to train on."""
    return write_words(tmp_path_factory.mktemp("corpus") / "text.txt")
