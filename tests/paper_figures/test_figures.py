import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from models import cli
from models.char_gpt import sweep as sweep_module
from models.char_gpt.config import Config, method_of
from models.corpus import load
from paper_figures import __main__ as command
from paper_figures import report
from paper_figures.comparison import compare, markdown_table, sentence
from paper_figures.inference_result import INFERENCE
from paper_figures.runs import METHOD_NAMES, load_runs
from paper_figures.style import METHOD_STYLES

TINY = Config(steps=1, layers=1, width=8, heads=2, context=8, batch=2, evaluation_windows=4)


METHODS = sweep_module.METHODS[::2]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A results folder as `make reproduce` leaves it, from a sweep of one step over some of the methods."""
    folder = tmp_path_factory.mktemp("results")
    text = folder / "text.txt"
    text.write_text(" ".join(np.random.default_rng(0).choice(["one", "two", "three"], 800)), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sweep_module.PROFILES, "tiny", sweep_module.Profile((0,), TINY))
        patch.setattr(sweep_module, "METHODS", METHODS)
        sweep_module.sweep("tiny", load(text, 9), folder / "runs" / "tiny", Console(quiet=True))
    command.main(["--runs", str(folder / "runs" / "tiny"), "--out", str(folder / "figures")])
    check = {
        "id": "some-claim",
        "mark": "derived",
        "statement": "det J < 1 & so on",
        "regime": "everywhere",
        "counterexample": "nowhere",
        "cases": 10,
        "figure": 1e-12,
        "tolerance": 1e-9,
        "verdict": "holds",
        "counterexample_figure": 2.0,
        "counterexample_verdict": "fails",
        "as_stated": True,
    }
    record = {"provenance": {"command": "python -m theory_checks"}, "checks": [check], "as_stated": True}
    (folder / "theory_checks.json").write_text(json.dumps(record))
    return folder


def test_every_figure_is_drawn_as_png_and_pdf(results):
    out = results / "figures"
    for figure in command.FIGURES:
        assert (out / f"{figure.NAME}.png").read_bytes().startswith(b"\x89PNG")
        assert (out / f"{figure.NAME}.pdf").read_bytes().startswith(b"%PDF")
    assert len(list(out.iterdir())) == 2 * len(command.FIGURES)


def test_axes_are_labelled_and_methods_differ_in_more_than_colour(results):
    for figure in command.FIGURES[2:]:
        from_inference = figure in command.FROM_INFERENCE
        drawn = figure.draw(INFERENCE if from_inference else results / "runs" / "tiny")
        for axes in drawn.axes:
            assert axes.get_xlabel() or not axes.axison
        assert drawn.axes[0].get_ylabel()
    assert set(METHOD_STYLES) == set(METHOD_NAMES)
    for trait in ("linestyle", "marker", "color"):
        assert len({str(style[trait]) for style in METHOD_STYLES.values()}) == len(METHOD_STYLES)


def test_the_report_stands_alone_and_holds_every_figure(results):
    html = report.build(results, "tiny")
    assert html.count("data:image/png;base64,") == len(command.FIGURES)
    assert not re.search(r"(src|href)=\"(?!data:)", html)
    assert "det J &lt; 1 &amp; so on" in html
    assert "1 of 1 checks came out as stated" in html
    for method in METHODS:
        assert method_of(method.objective, method.site) in html


def fake_runs(tmp_path, clean, noisy):
    """A sweep of ce and one method over two seeds with the given losses."""
    members = []
    for method in ("ce", "margin@layers"):
        for seed in (0, 1):
            members.append(
                {
                    "run": f"{method}-{seed}",
                    "method": method,
                    "provenance": {"seed": seed, "configuration": {"barrier_weight": 0.05}},
                    "clean_loss": {"nats_per_character": clean[method][seed]},
                    "noise": [
                        {"kind": "relative", "sigma": 1.0, "increase": noisy[method][seed]},
                        {"kind": "absolute", "sigma": 0.2, "increase": noisy[method][seed]},
                    ],
                    "embedding_rms": 0.1,
                    "margins": {"layers": {"negative_share": 0.0}},
                    "crossings": {"layers": {"steps_with_crossing": 1, "steps_watched": 4}},
                }
            )
    (tmp_path / "summary.json").write_text(json.dumps({"runs": members}))
    return load_runs(tmp_path)


def test_changes_are_paired_by_seed_and_a_direction_needs_every_seed(tmp_path):
    runs = fake_runs(
        tmp_path,
        clean={"ce": [2.0, 4.0], "margin@layers": [2.2, 4.2]},
        noisy={"ce": [0.5, 0.5], "margin@layers": [0.4, 0.6]},
    )
    found = compare(runs)[1]
    np.testing.assert_allclose(found.clean_change, (7.5, 5.0, 10.0))
    np.testing.assert_allclose(found.relative_change, (0.0, -20.0, 20.0), atol=1e-12)
    assert found.crossing_steps.mean == 0.25
    words = sentence(found)
    assert "clean loss 7.50 % worse (every seed)" in words
    assert "undecided (from -20.00 % to +20.00 % over seeds)" in words


def test_a_sweep_without_its_baseline_is_refused(tmp_path):
    runs = fake_runs(
        tmp_path,
        clean={"ce": [2.0, 4.0], "margin@layers": [2.2, 4.2]},
        noisy={"ce": [0.5, 0.5], "margin@layers": [0.4, 0.6]},
    )
    runs.by_method["ce"].pop()
    with pytest.raises(ValueError, match="has margin@layers for seeds without ce"):
        compare(runs)


def test_method_names_are_those_of_the_runs():
    for method in sweep_module.METHODS:
        config = dataclasses.replace(TINY, objective=method.objective, barrier_site=method.site)
        assert config.method == method_of(method.objective, method.site)


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (command.main, ["--only", "nothing"], "--only: got nothing; pass one of boundary_plane"),
        (command.main, ["--only", "noise_loss", "--runs", "missing"], "--runs: no readable sweep at missing"),
        (report.main, ["--results", "missing"], "--results: no checks at missing"),
    ],
)
def test_bad_arguments_end_with_one_line_and_status_2(main, arguments, message, capsys):
    with pytest.raises(SystemExit) as info:
        cli.run(lambda: main(arguments))
    assert info.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_the_readme_shows_the_figures_of_the_committed_run():
    root = Path(report.__file__).resolve().parent.parent
    table = markdown_table(compare(load_runs(root / "results" / "reference" / "runs" / "quick")))
    assert table in (root / "README.md").read_text(encoding="utf-8")
