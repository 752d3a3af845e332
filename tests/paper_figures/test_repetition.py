"""Margins before repetition and errors: on texts whose truth is known, and the page against the committed result."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax
from scipy.stats import spearmanr

from paper_figures.behaviour.repetition import (
    BEFORE,
    FIGURES,
    Text,
    concordance,
    main,
    measure_text,
    onset_of_repetition,
    rows,
    shown,
    surprise_correlation,
)
from prob_transformer import layer_margins
from prob_transformer.pretrained.load import load_pretrained
from tests.helpers.tiny_models import LLAMA, llama_weights, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("model") / "tiny", LLAMA, llama_weights(LLAMA))


def test_the_onset_is_the_first_start_that_was_there_before():
    assert onset_of_repetition(np.array([1, 2, 3, 9, 1, 2, 3]), 2, 3) == 4
    assert onset_of_repetition(np.array([1, 2, 3, 9, 1, 2]), 2, 3) is None
    # A run may overlap with what it repeats, and one that begins in the prompt is none of the generated text.
    assert onset_of_repetition(np.array([5, 7, 7, 7, 7]), 1, 3) == 2
    assert onset_of_repetition(np.array([7, 7, 7, 7, 5]), 2, 3) is None
    rng = np.random.default_rng(0)
    found = set()
    for _ in range(200):
        tokens = rng.integers(0, 3, 14)
        onset = onset_of_repetition(tokens, 5, 4)
        whole = "".join(map(str, tokens))
        starts = [i for i in range(5, 11) if whole.find(whole[i : i + 4]) < i]
        assert onset == (starts[0] if starts else None)
        found.add(onset)
    assert len(found) > 4


def texts_with(margin_before, count=40, length=60, seed=0):
    """Texts of which half have an onset; margins rise with the position, and change before an onset."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        onset = int(rng.integers(BEFORE, length)) if number % 2 else None
        margin = 0.1 * np.arange(length) + rng.normal(size=length)
        if onset is not None:
            margin[onset + 1 - BEFORE : onset + 1] += margin_before
        found.append(Text(dict.fromkeys(FIGURES, margin), rng.normal(size=length), onset))
    return found


def test_concordance_is_1_after_a_drop_0_after_a_rise_and_a_half_for_a_trend_alone():
    assert concordance(texts_with(-100), "lowest", 100, 0)["concordance"] == 1
    assert concordance(texts_with(100), "lowest", 100, 0)["concordance"] == 0
    nothing = concordance(texts_with(0, count=200), "lowest", 200, 0)
    assert nothing["onsets"] == 100
    low, high = nothing["interval"]
    assert low < nothing["concordance"] < high
    assert (low, high) == pytest.approx((0.5, 0.5), abs=0.12)
    assert low < 0.5 < high


def test_concordance_is_the_share_of_pairs_counted_one_by_one():
    texts = texts_with(-0.5, count=12)
    shares = []
    for text in texts:
        if text.onset is None:
            continue
        larger = compared = 0
        for other in texts:
            if other.onset is None or other.onset > text.onset:
                window = range(text.onset - 7, text.onset + 1)
                own, its = (sum(one.margins["mean"][i] for i in window) for one in (text, other))
                larger, compared = larger + (its > own), compared + 1
        shares.append(larger / compared)
    assert 0 < np.mean(shares) < 1
    assert concordance(texts, "mean", 100, 0)["concordance"] == pytest.approx(np.mean(shares), rel=1e-12)
    early = [Text(text.margins, text.surprise, BEFORE - 2) for text in texts]
    assert concordance(early, "mean", 100, 0) == {"concordance": None, "interval": None, "onsets": 0}


def test_correlation_is_the_mean_of_those_within_texts():
    rng = np.random.default_rng(1)
    texts = []
    for shift in range(20):
        # Between texts both rise together; within a text there is a common trend, and beyond it nothing.
        x, y = (shift + 0.2 * np.arange(30) + rng.normal(size=30) for _ in range(2))
        texts.append(Text(dict.fromkeys(FIGURES, x), y, None))
    expected = np.mean([spearmanr(text.margins["mean"], text.surprise).statistic for text in texts])
    found = surprise_correlation(texts, "mean", False, 500, 0)
    assert found["correlation"] == pytest.approx(expected, rel=1e-12)
    assert found["interval"][0] > 0.5
    low, high = surprise_correlation(texts, "mean", True, 500, 0)["interval"]
    assert low < 0 < high


def test_figures_of_a_text_are_of_the_positions_its_tokens_were_predicted_from(folder):
    decoder = load_pretrained(str(folder)).decoder
    tokens = np.random.default_rng(2).integers(0, 256, 24)
    tokens[14:24] = tokens[2:12]
    found = measure_text(decoder, tokens, 10)
    assert found.onset == 4
    logs = log_softmax(np.asarray(decoder(tokens), np.float64), axis=-1)
    np.testing.assert_allclose(found.surprise, -logs[np.arange(9, 23), tokens[10:]], rtol=1e-4, atol=1e-4)
    margins = [layer_margins(*pair) for pair in decoder.layers(tokens)]
    log_det, sign = (np.concatenate([getattr(m, name) for m in margins])[:, 9:23] for name in ("log_det", "sign"))
    np.testing.assert_allclose(found.margins["lowest"], log_det.min(0))
    np.testing.assert_allclose(found.margins["mean"], log_det.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.margins["positive"], (sign == 1).mean(0))


def test_the_command_writes_and_prints_the_figures(folder, tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "text.txt").write_text("\f".join("".join(rng.choice([*"abc de"], 70)) for _ in range(3)))
    asked = ["--model", str(folder), "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out.json")]
    more = ["--texts", "4", "--prompt", "16", "--length", "16", "--resamples", "100"]
    main(asked + more)
    found = json.loads((tmp_path / "out.json").read_text())
    assert [*found["kinds"]] == ["real", "greedy", "temperature 0.7"]
    assert len(found["kinds"]["greedy"]["onsets"]) == 4
    told = " ".join(capsys.readouterr().out.split())
    for row in rows(found["kinds"]):
        assert " | ".join(cell for cell in row if cell) in told
    refused = (("--length", "17"), "--length: prompt and text"), (("--temperature", "0"), "--temperature")
    for wrong, message in refused:
        with pytest.raises(ValueError, match=message):
            main([*asked, *more, *wrong])


def test_the_page_shows_the_committed_result():
    root = Path(__file__).parents[2]
    page = (root / "docs/inspect.md").read_text(encoding="utf-8")
    found = json.loads((root / "results/reference/smollm2/repetition.json").read_text())
    for row in rows(found["kinds"]):
        assert "| " + " | ".join(row) + " |" in page
    drawn = [kind["repetition"] for kind in found["kinds"].values() if "repetition" in kind]
    greedy, warm = (one["lowest"]["onsets"] for one in drawn)
    assert f"{greedy} onsets of the greedy texts and {warm} of those at temperature 0.7" in page
    ends = [end for one in drawn for figure in FIGURES for end in one[figure]["interval"]]
    assert f"which reach from {min(ends):.2f} to {max(ends):.2f}" in page
    findings = " ".join((root / "docs/findings.md").read_text(encoding="utf-8").split())
    greedy, warm = (shown(one["lowest"], "concordance") for one in drawn)
    assert f"{greedy} in greedy text and {warm} at temperature 0.7" in findings
