import pytest

from prob_transformer.__main__ import main
from tests.helpers.error_lines import assert_refused
from tests.helpers.foreign_models import TEXT


@pytest.fixture
def inspect(tmp_path):
    """The command on a model and the text of the truth; gives its exit status."""

    def run(model, *more):
        (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
        given = ["--model", str(model), "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out"), *more]
        return main(["inspect", *given])

    return run


@pytest.fixture
def refused(inspect, tmp_path, capsys):
    """That the command says the word of a model in one line, ends with status 2 and writes nothing."""

    def check(model, word):
        assert inspect(model) == 2
        assert_refused(capsys, word)
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".*"))

    return check
