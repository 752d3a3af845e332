"""What is said, written and drawn of a generated text, against numbers that were chosen by hand: no model is read."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from prob_transformer.inspection.generate import _Pieces
from prob_transformer.inspection.generated_text import summary, write_files


@pytest.fixture
def found():
    """Three layers of two heads on four tokens; 0.125 at layer 2, head 1, token 3 is the smallest |det J|."""
    size = np.arange(24.0).reshape(3, 2, 4) + 2
    size[2, 1, 3] = 0.125
    sign = np.ones((3, 2, 4), np.int8)
    # det J has both its smallest value, -18, and its largest, 24, away from the smallest |det J|.
    sign[0, 0, :3] = sign[1, 1, 0] = sign[1, 1, 3] = sign[2, 0, 0] = -1
    return {
        "tokens": np.array([7, 8, 9, 7]),
        "log_probs": np.array([-1.0, -2.0, -0.5, -3.0]),
        "sign": sign,
        "log_det": np.log(size),
        "conditioning": np.arange(24.0)[::-1].reshape(3, 2, 4) / 4 + 0.0625,
    }


def test_the_summary_says_the_likelihood_and_the_margins(found):
    assert summary(found, "token") == (
        "4 tokens, on average 1.625 nats each under the model. det J <= 0 at 25.00% of the places; the smallest "
        "|det J| is 0.125, in layer 2, head 1, at token 3; the smallest sigma_min(J) is 0.0625."
    )


def test_the_summary_counts_a_singular_place_among_those_that_are_not_positive(found):
    found["sign"][2, 0, 1], found["log_det"][2, 0, 1] = 0, -np.inf
    assert summary(found, "character") == (
        "4 characters, on average 1.625 nats each under the model. det J <= 0 at 29.17% of the places; the smallest "
        "|det J| is 0, in layer 2, head 0, at character 1; the smallest sigma_min(J) is 0.0625."
    )


def test_the_file_has_the_prompt_and_the_text(tmp_path):
    options = argparse.Namespace(json=tmp_path / "text.json", figure=None, prompt="To be")
    written = {"tokens": np.array([4, 5]), "log_probs": np.array([-0.5, -0.25])}
    write_files(options, [(written, [" or", " not"])], "token", lambda asked: {"asked": asked["prompt"]})
    record = json.loads(options.json.read_text(encoding="utf-8"))
    assert "of the strict past" in record.pop("margins")
    assert record == {
        "asked": "To be",
        "prompt": "To be",
        "text": " or not",
        "tokens": [4, 5],
        "log_probs": [-0.5, -0.25],
    }


def test_the_figure_shows_the_smallest_over_the_heads_of_each_layer(tmp_path, monkeypatch):
    drawn = []

    def keep(figure, path, **_):
        drawn.append(figure)
        Path(path).touch()

    monkeypatch.setattr(Figure, "savefig", keep)
    # Axes: layer, head, token. In either layer another head is the smallest at another token.
    size = np.array([[[1.0, 5.0, 0.5], [4.0, 2.0, 0.25]], [[3.0, 0.75, 6.0], [8.0, 7.0, 1.5]]])
    sign = np.array([[[1, 1, -1], [-1, 1, 1]], [[1, 0, 1], [1, 1, 1]]])
    conditioning = np.array([[[0.5, 0.125, 0.25], [0.375, 0.625, 0.75]], [[0.1, 0.2, 0.9], [0.8, 0.7, 0.3]]])
    written = {"sign": sign, "log_det": np.log(size), "conditioning": conditioning}
    options = argparse.Namespace(json=None, figure=tmp_path / "text.png")
    write_files(options, [(written, ["a", "b", "c"])], "character", lambda _: {})

    [figure] = drawn
    determinants, singular_values = figure.axes
    ticks = [line for line in determinants.lines if line.get_marker() == "|"]
    curves = [line for line in determinants.lines if line.get_marker() != "|"]
    assert [line.get_label() for line in curves] == ["layer 0", "layer 1"]
    np.testing.assert_allclose([line.get_ydata() for line in curves], [[1, 2, 0.25], [3, 0.75, 1.5]], rtol=1e-12)
    # A tick stands on its layer's curve where det J <= 0 in either head.
    assert [line.get_xdata().tolist() for line in ticks] == [[0, 2], [1]]
    np.testing.assert_allclose(np.concatenate([line.get_ydata() for line in ticks]), [1, 0.25, 0.75], rtol=1e-12)
    smallest = [line.get_ydata().tolist() for line in singular_values.lines]
    assert smallest == [[0.375, 0.125, 0.25], [0.1, 0.2, 0.3]]


class _OneTokenAByte:
    """Decodes as a byte-level tokenizer does: bytes that end in the middle of a character give U+FFFD."""

    def decode(self, tokens, skip_special_tokens):
        assert not skip_special_tokens
        return bytes(tokens).decode("utf-8", "replace")


def test_a_character_is_written_with_its_last_byte():
    written = _Pieces(_OneTokenAByte(), list(b"a"))
    assert [written.add(byte, is_last=False) for byte in "é!".encode()] == ["", "é", "!"]


def test_a_text_that_ends_inside_a_character_ends_with_the_replacement_character():
    written = _Pieces(_OneTokenAByte(), list(b"a"))
    first, second, last = b"b" + "😀".encode()[:2]
    assert [written.add(first, False), written.add(second, False), written.add(last, True)] == ["b", "", "\ufffd"]
    assert written.pieces == ["b", "", "\ufffd"]
