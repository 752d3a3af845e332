import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from scipy.stats import linregress, rankdata, spearmanr

from paper_figures.behaviour.__main__ import COLUMNS, _shown, main
from paper_figures.behaviour.correlations import Relation, described, partial_correlation, relate
from paper_figures.behaviour.measure import (
    PAST_SHARE,
    SHORTEST_PAST,
    attention,
    logit_change,
    measure_passage,
    passages,
)
from prob_transformer import layer_margins
from prob_transformer.pretrained.load import load_pretrained
from tests.helpers.tiny_models import LLAMA, llama_weights, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("models") / "tiny", LLAMA, llama_weights(LLAMA))


@pytest.fixture(scope="module")
def decoder(folder):
    return load_pretrained(str(folder)).decoder


TOKENS = np.random.default_rng(0).integers(0, 256, 16).astype(np.int32)


def made_up(effect, count=12, length=40, seed=0):
    """Passages whose outcome is `effect` times a margin that follows a baseline, plus noise."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        baseline = rng.normal(size=length)
        margin = baseline + rng.normal(size=length)
        outcome = effect * margin + baseline + rng.normal(size=length) + 0.5 * rng.normal()
        found.append({"margin": margin, "baseline": baseline, "outcome": outcome})
    return found


def test_correlations_are_those_of_scipy():
    x, y, z = np.random.default_rng(1).normal(size=(3, 50))
    x, y = np.round(x + z, 1), np.round(y + z, 1)
    assert partial_correlation(x, y) == pytest.approx(spearmanr(x, y).statistic, rel=1e-12)
    ranks = [rankdata(v) for v in (x, y, z)]
    left = [r - linregress(ranks[2], r).slope * ranks[2] for r in ranks[:2]]
    assert partial_correlation(x, y, [z]) == pytest.approx(np.corrcoef(*left)[0, 1], rel=1e-9)
    assert partial_correlation(np.ones(50), y) == 0


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_say():
    # Margin and outcome share nothing but what a passage has in common.
    missed = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        shifts = rng.normal(size=(15, 2, 1))
        drawn = [{"a": s[0] + rng.normal(size=20), "b": s[1] + rng.normal(size=20)} for s in shifts]
        low, high = relate(drawn, "a", "b", (), 1, 200, seed).interval
        missed += not low <= 0 <= high
    # 5 % asked; fifteen blocks give a little less than that, and intervals over tokens would miss far more often.
    assert missed <= 15


def test_verdicts_are_made_by_the_intervals():
    def said(effect):
        found = made_up(effect)
        pair = [relate(found, "margin", "outcome", c, 4, 200, 0) for c in ((), ("baseline",))]
        return described("margin", "outcome", *pair, relate(found, "baseline", "outcome", (), 4, 200, 0))

    assert said(0.0).startswith("'outcome' rises with 'margin': moderate")
    assert "nothing is shown beyond attention entropy and position" in said(0.0)
    assert "alone it orders tokens less than entropy does" in said(0.0)
    assert "given attention entropy and position it is strong" in said(1.0)
    assert said(-2.0).startswith("'outcome' falls with 'margin': strong")
    unclear = Relation(0.1, (0.01, 0.2), (-0.01, 0.21))
    assert described("m", "o", unclear, unclear, unclear).startswith("no relation between 'm' and 'o' is shown (+0.10)")


def test_entropy_and_past_share_are_of_the_weights_with_the_position_included(decoder):
    layer, inputs = next(decoder.layers(TOKENS))
    entropy, past_share = attention(layer, inputs)
    u = np.asarray(inputs, np.float64)
    frequencies = np.asarray(layer.rotary.frequencies, np.float64)

    def turned(x, position):
        pairs = (x[:2] + 1j * x[2:]) * np.exp(1j * position * frequencies)
        return np.concatenate([pairs.real, pairs.imag])

    for head, i in ((0, 0), (1, 5), (3, 15)):
        query = turned(np.asarray(layer.query[head]) @ u[i], i)
        keys = [turned(np.asarray(layer.key[head // 2]) @ u[s], s) for s in range(i + 1)]
        weights = softmax(np.array(keys) @ query / 2)
        np.testing.assert_allclose(entropy[head, i], -(weights * np.log(weights)).sum(), rtol=1e-4, atol=1e-6)
        with np.errstate(divide="ignore"):
            np.testing.assert_allclose(past_share[head, i], np.log(weights[:-1].sum()), rtol=1e-4, atol=1e-6)


def test_figures_of_a_passage(decoder):
    found = measure_passage(decoder, TOKENS, 0.1, 2, jax.random.key(0))
    kept = slice(SHORTEST_PAST, TOKENS.size - 1)
    logs = log_softmax(np.asarray(decoder(TOKENS), np.float64), axis=-1)
    np.testing.assert_allclose(found.figures["loss"], -logs[np.arange(15), TOKENS[1:]][kept], rtol=1e-4)
    attended = [attention(*pair)[1] for pair in decoder.layers(TOKENS)]
    np.testing.assert_allclose(found.figures[PAST_SHARE], np.concatenate(attended).mean(0)[kept], rtol=1e-5)
    for reading, inclusive in (("strict", False), ("inclusive", True)):
        margins = [layer_margins(*pair, self_inclusive=inclusive) for pair in decoder.layers(TOKENS)]
        barrier = np.concatenate([m.barrier for m in margins])[:, kept]
        negative = np.stack([m.sign for m in margins])[..., kept] < 0
        np.testing.assert_allclose(found.figures[f"{reading} closest"], barrier.max(0))
        np.testing.assert_allclose(found.figures[f"{reading} mean"], barrier.mean(0), rtol=1e-5)
        np.testing.assert_allclose(found.figures[f"{reading} negative"], negative.mean((0, 1)))
        np.testing.assert_allclose(found.negative[reading], negative.mean(-1))


def test_change_is_a_mean_divergence_that_falls_with_the_square_of_the_noise(decoder):
    key, size = jax.random.key(1), 1e-2
    embeddings = decoder.embed(TOKENS)
    logits = decoder(TOKENS)
    logs = log_softmax(np.asarray(logits, np.float64), axis=-1)
    expected = 0
    for draw in jax.random.split(key, 2):
        noise = size * jnp.sqrt(jnp.square(embeddings).mean()) * jax.random.normal(draw, embeddings.shape, jnp.float32)
        changed = log_softmax(np.asarray(decoder.logits_from(embeddings + noise), np.float64), axis=-1)
        expected = expected + (np.exp(logs) * (logs - changed)).sum(-1) / 2
    found = logit_change(decoder, TOKENS, logits, size, 2, key)
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-6)
    ratio = logit_change(decoder, TOKENS, logits, 3 * size, 2, key).mean() / found.mean()
    assert 7 < ratio < 11


def test_passages_come_from_all_documents_in_turn():
    documents = [np.arange(7), np.arange(10, 13), np.arange(20, 29)]
    found = [p.tolist() for p in passages(documents, 3, 5)]
    assert found == [[0, 1, 2], [10, 11, 12], [20, 21, 22], [3, 4, 5], [23, 24, 25]]
    with pytest.raises(ValueError, match="holds 6 passages of 3 tokens, not 7"):
        list(passages(documents, 3, 7))


def test_the_page_shows_the_committed_result():
    root = Path(__file__).parents[2]
    page = (root / "docs/inspect.md").read_text(encoding="utf-8")
    found = json.loads((root / "results/reference/smollm2/behaviour.json").read_text())
    for row in found["relations"]:
        assert " | ".join([f"| {row['outcome']}", row["figure"], *(_shown(row.get(name)) for name in COLUMNS)]) in page
    for layer, shares in enumerate(found["negative_share"]["strict"]):
        assert f"| {layer} | " + " | ".join(f"{100 * x:.1f}" for x in (*shares, np.mean(shares))) + " |" in page
    assert f"{found['tokens']:,} tokens" in page


def test_the_command_writes_figures_and_verdicts(folder, tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "text.txt").write_text("\f".join("".join(rng.choice([*"abc de"], 40)) for _ in range(2)))
    asked = ["--model", str(folder), "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out.json")]
    more = ["--passages", "4", "--tokens", "16", "--draws", "2", "--resamples", "100"]
    main(asked + more)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["tokens"] == 4 * (16 - 1 - SHORTEST_PAST)
    assert np.shape(found["negative_share"]["strict"]) == (2, 4)
    verdicts = [row["verdict"] for row in found["relations"] if "verdict" in row]
    assert len(verdicts) == 12
    told = " ".join(capsys.readouterr().out.split())
    assert all(verdict in told for verdict in verdicts)
    for wrong, message in (
        (("--tokens", "99"), "--tokens: got 99; the model's context is 32"),
        (("--noise", "0"), "--noise: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            main([*asked, *more, *wrong])
