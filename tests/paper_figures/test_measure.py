import dataclasses
import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from scipy.special import log_softmax

from models.char_gpt import commands as command
from models.char_gpt import evaluation
from models.char_gpt.config import Config
from models.char_gpt.laplace import score
from models.corpus import load
from paper_figures.study import runs, sweep
from paper_figures.study.analysis import analyse
from paper_figures.study.perturbations import KINDS
from paper_figures.study.perturbations import measured as measure
from paper_figures.study.tables import markdown
from tests.helpers.synthetic_runs import write_runs
from tests.helpers.tiny_gpt import compiled_logits, dense_at, made
from tests.helpers.words import write_words

TINY = Config(layers=2, width=8, heads=2, context=8, evaluation_windows=8)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return load(write_words(tmp_path_factory.mktemp("corpus") / "text.txt"), TINY.context + 1)


@pytest.fixture(scope="module")
def model(corpus):
    return made(TINY, len(corpus.vocabulary))


@pytest.fixture(scope="module")
def measured(model, corpus):
    return measure(model, corpus, TINY, with_passage=True)


def test_every_split_has_its_figures_and_only_unseen_text_is_perturbed(measured, corpus):
    json.dumps(measured, allow_nan=False)
    assert set(measured) == {"embedding_rms", "splits", "margins", "passage"}
    assert list(measured["splits"]) == ["validation", "test", "news"]
    assert measured["splits"]["validation"]["perturbed"] == []
    for split, windows in (("validation", 8), ("test", 8), ("news", 4)):
        found = measured["splits"][split]
        assert found["clean"]["characters"] == windows * TINY.context
        if split != "validation":
            rows = [(row["kind"], row["level"]) for row in found["perturbed"]]
            assert rows == [(kind, level) for kind, one in KINDS.items() for level in one.levels]
            for row in found["perturbed"]:
                change = row["nats_per_character"] - found["clean"]["nats_per_character"]
                np.testing.assert_allclose(row["increase"], change, atol=1e-12)


def test_the_clean_loss_is_that_of_the_windows_by_hand(measured, model, corpus):
    windows = evaluation.evaluation_windows(corpus.validation, TINY)
    log_p = log_softmax(np.asarray(compiled_logits(model, jnp.asarray(windows))), axis=-1)
    losses = -np.take_along_axis(log_p, windows[:, 1:, None], -1)[..., 0].mean(-1)
    clean = measured["splits"]["validation"]["clean"]
    np.testing.assert_allclose(clean["nats_per_character"], losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(clean["standard_error"], losses.std(ddof=1) / np.sqrt(8), rtol=1e-4)


def test_one_window_leaves_every_error_undefined_and_the_tables_and_verdicts_are_made_without(model, corpus, tmp_path):
    measured = measure(model, corpus, dataclasses.replace(TINY, evaluation_windows=1), with_passage=False)
    for name, split in measured["splits"].items():
        assert split["clean"]["characters"] == TINY.context
        rows = [split["clean"], *split["perturbed"]]
        assert len(rows) == (1 if name == "validation" else 1 + sum(len(kind.levels) for kind in KINDS.values()))
        errors = [value for row in rows for key, value in row.items() if key.endswith("standard_error")]
        assert errors == [None] * (2 * len(rows) - 1)
    folder = write_runs(tmp_path / "runs", {}, seeds=1)
    made_up = runs.read(folder / runs.NAME)
    (folder / runs.NAME).unlink()
    for run in made_up:
        runs.append(folder / runs.NAME, runs.shortened(run | measured))
    record = analyse(runs.load_runs(folder))
    text = json.dumps(record, allow_nan=False)
    assert "standard_error" not in text
    shown = (markdown(record), sweep.table(runs.read(folder / runs.NAME)), *(e["sentence"] for e in record["findings"]))
    assert "nan" not in "".join(shown).lower()


def test_determinant_levels_are_quantiles_of_every_layer(measured, model, corpus):
    _, determinants = evaluation.margins(model, evaluation.evaluation_windows(corpus.validation, TINY))
    margins = measured["margins"]
    levels = [margins["embedding"]["determinant_levels"], *margins["layers"]["determinant_levels"]]
    for found, values in zip(levels, [determinants["embedding"], *determinants["layers"]], strict=True):
        assert len(found) == 41
        for index, level in ((0, values.min()), (20, np.median(values)), (40, values.max())):
            np.testing.assert_allclose(found[index], level, rtol=1e-6)


def test_the_passage_is_where_validation_begins_with_the_smallest_margin_of_the_heads(measured, model, corpus):
    passage = measured["passage"]
    n = TINY.context
    windows = corpus.validation[: 3 * n].reshape(3, n)
    assert passage["text"] == "".join(corpus.vocabulary.characters[i] for i in windows.ravel())
    # One character more, which nothing reads.
    padded = np.pad(windows, ((0, 0), (0, 1)))
    embedding, layers = (np.linalg.det(dense_at(model, site, padded)[1]).min(1) for site in ("embedding", "layers"))
    for found, expected in zip((passage["embedding"], *passage["margins"]), (*embedding, *layers), strict=True):
        by_window = np.array(found, dtype=float).reshape(3, n)
        assert np.isnan(by_window[:, :2]).all()
        np.testing.assert_allclose(by_window[:, 2:], expected[:, 2:], rtol=1e-3)


def test_windows_do_not_overlap_and_a_text_too_short_is_named():
    config = dataclasses.replace(TINY, evaluation_windows=50)
    for spare, share, count in ((0, 1.0, 50), (6, 1.0, 50), (6, 0.5, 25)):
        windows = evaluation.evaluation_windows(np.arange(1000), config, spare, share)
        assert windows.shape == (count, TINY.context + 1 + spare)
        assert len(np.unique(windows)) == windows.size
    with pytest.raises(
        ValueError, match=r"--corpus: a part to be evaluated on has 10 characters and a window needs 15"
    ):
        evaluation.evaluation_windows(np.arange(10), config, 6)


def test_quantiles_of_overflowed_determinants_are_none_and_those_below_stay():
    values = np.array([1.0, 2.0, 3.0, np.inf, np.inf], np.float32)
    assert evaluation.quantiles(values, (0.0, 0.25, 0.95, 1.0)) == [1.0, 2.0, None, None]


def test_one_window_has_no_standard_error(monkeypatch, tmp_path):
    losses = np.array([2.5])
    assert evaluation.standard_error(losses) is None
    monkeypatch.setattr(evaluation, "perturbed_losses", lambda *arguments: [losses + level for level in arguments[3]])
    for row in evaluation.perturbed_rows(None, None, losses, None, {"noise": evaluation.EMBEDDING_NOISE}):
        assert row["standard_error"] is None
        assert row["increase_standard_error"] is None
        np.testing.assert_allclose(row["increase"], row["level"])
    assert score(np.array([[[0.9, 0.1]]]), np.zeros((1, 1), int), losses)["standard_error"] is None
    clean = evaluation.clean_summary(losses, TINY)
    assert json.dumps(clean, allow_nan=False) == '{"nats_per_character": 2.5, "standard_error": null, "characters": 8}'
    console = Console(file=io.StringIO(), width=300)
    command._report(
        console, {"method": "ce", "clean_loss": clean, "margins": {"layers": {"negative_share": 0.0}}}, tmp_path
    )
    assert "8 validation characters (one window, so no standard error)" in console.file.getvalue()
