import itertools
import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from models import cli
from paper_figures import __main__ as command
from paper_figures import report
from paper_figures.figures import style
from paper_figures.study import __main__ as study
from paper_figures.study import runs
from paper_figures.study.analysis import analyse, load_verdicts
from paper_figures.study.comparisons import PERTURBATIONS
from paper_figures.study.design import METHODS
from paper_figures.study.strength_selection import at_equal_cost
from paper_figures.study.tables import markdown
from tests.helpers.figures import assert_nothing_is_cut_off
from tests.helpers.synthetic_runs import Truth, write_runs

ROOT = Path(report.__file__).resolve().parent.parent
REFERENCE = ROOT / "results" / "reference"


def judge(folder, profile):
    study.main(["verdicts", "--runs", str(folder / "runs" / profile), "--out", str(folder / "verdicts.json")])


def link(source, folder, *names):
    for name in names:
        (folder / name).symlink_to(source / name)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A results folder as `make reproduce` leaves it, from runs that were made up; its pictures are empty files."""
    folder = tmp_path_factory.mktemp("results")
    write_runs(folder / "runs" / "made-up", {"margin@layers": Truth(effect=-0.2, crossings=0.0)})
    (folder / "theory_checks.json").write_text((REFERENCE / "theory_checks.json").read_text())
    judge(folder, "made-up")
    (folder / "figures").mkdir()
    for name in command.FIGURES:
        (folder / "figures" / f"{name}.png").touch()
    return folder


@pytest.mark.parametrize("only", [("noise_loss",), pytest.param((), marks=pytest.mark.slow)], ids=["one", "all"])
def test_every_figure_is_drawn_as_png_and_pdf(results, tmp_path, only):
    given = ["--runs", str(results / "runs" / "made-up"), "--checks", str(results / "theory_checks.json")]
    command.main([*given, "--out", str(tmp_path), *(part for name in only for part in ("--only", name))])
    names = only or command.FIGURES
    for name in names:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert len(list(tmp_path.iterdir())) == 2 * len(names)


def test_the_methods_of_the_study_are_told_apart_in_grey():
    looks = {method: style.METHOD_STYLES[method] for method in METHODS}
    assert len({(str(look["linestyle"]), look["marker"]) for look in looks.values()}) == len(looks)


@pytest.mark.parametrize("name", ["trade_off", "noise_loss", "clean_strength", "training_margins", "training_barrier"])
def test_axes_are_labelled_and_nothing_is_cut_off(results, name):
    drawn = command.draw(name, {"runs": results / "runs" / "made-up"})
    assert any(axes.get_xlabel() for axes in drawn.axes)
    assert any(axes.get_ylabel() for axes in drawn.axes)
    assert_nothing_is_cut_off(drawn)


def test_the_report_holds_every_verdict_and_links_every_figure_beside_it(results):
    html = report.build(results, "made-up")
    assert re.findall(r'(?:src|href)="([^"]*)"', html) == [f"figures/{name}.png" for name in command.FIGURES]
    assert all((results / link).is_file() for link in re.findall(r'src="([^"]*)"', html))
    assert "://" not in html
    assert "15 of 15 checks came out as stated" in html
    assert all(method in html for method in METHODS)
    record = json.loads((results / "verdicts.json").read_text())
    asked = ("What was asked", "What was done", "What was found", "What remains open")
    assert tuple(re.findall("<h3>(.*)</h3>", html)) == asked
    assert html.count("<li>") >= len(record["findings"]) + len(record["answers"])
    # det J <= 0 in a heading is text, not markup.
    assert "det J &lt;= 0 in layers" in html


def test_a_report_without_a_figure_is_refused_by_the_name_of_its_file(tmp_path, results):
    link(results, tmp_path, "theory_checks.json", "verdicts.json", "runs")
    with pytest.raises(ValueError, match=r"--results: no figure at .*figures/trade_off\.png; run python -m"):
        report.build(tmp_path, "made-up")


def test_a_report_on_few_seeds_says_so(tmp_path, results):
    write_runs(tmp_path / "runs" / "few", {}, seeds=2)
    link(results, tmp_path, "theory_checks.json", "figures")
    judge(tmp_path, "few")
    assert "Seeds that every method has finished: 2 of 2 begun." in report.build(tmp_path, "few")
    assert "Seeds that every method has finished" not in report.build(results, "made-up")


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (command.main, ["--only", "nothing"], "--only: got nothing; pass one of trade_off"),
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


@pytest.fixture(scope="module")
def record():
    return load_verdicts(REFERENCE / "verdicts.json")


@pytest.fixture(scope="module")
def sweep():
    return runs.load_runs(REFERENCE / "runs" / "full")


@pytest.fixture(scope="module")
def findings_page():
    return (ROOT / "docs" / "findings.md").read_text(encoding="utf-8").replace("\n  ", " ")


def shown(changes, digits=1):
    """The mean of changes in per cent and its 95 % interval, by SciPy."""
    low, high = stats.ttest_1samp(changes, 0).confidence_interval(0.95)
    return f"{np.mean(changes):+.{digits}f} % ({low:+.{digits}f} to {high:+.{digits}f})"


def changes_of(comparison):
    """In per cent, seed by seed; a change is the negative of a gain."""
    return -100 * np.array(comparison["gains"])


def increase(run, split="test"):
    return runs.increase(run, split, *PERTURBATIONS[0])


def test_the_findings_show_the_tables_and_answers_of_the_committed_verdicts(record):
    page = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    assert all(told in page for told in (markdown(record), *record["answers"]))


def test_the_sentences_of_the_pages_have_the_figures_of_the_committed_verdicts(record, sweep, findings_page):
    page, readme = findings_page, (ROOT / "README.md").read_text(encoding="utf-8")
    found = {(f["finding"], f["method"], f["split"]): f for f in record["findings"]}
    robust = found["robustness", "margin@layers", "test"]
    assert f"the increase changes by {shown(changes_of(robust['comparisons'][0]))}" in page
    assert f"embedding noise by {100 * robust['comparisons'][0]['mean_gain']:.0f} % on average" in readme
    # "do not establish" and "is ruled out" are said as long as the verdicts are these.
    assert robust["verdict"] == "undecided"
    for split in ("test", "news"):
        ours = {c["against"]: c for c in found["ours", "margin@layers", split]["comparisons"] if not c["untested"]}
        competitors = ("dropout", "embedding-noise", "jacobian", "spectral")
        assert {name: c["verdict"] for name, c in ours.items()} == dict.fromkeys(competitors, "not supported")
        assert {name for name, c in ours.items() if c["p_holm"] < 0.05 and c["mean_gain"] < 0} == {"jacobian"}
    against = found["ours", "margin@layers", "test"]["comparisons"][3]
    low, high = stats.ttest_1samp(changes_of(against), 0).confidence_interval()
    assert f"by 6.9 % of the increase of plain training ({low:.1f} to {high:.1f} %)" in page
    geometry = found["geometry", "margin@layers", "validation"]
    assert geometry["verdict"] == "supported"
    assert f"by {100 * geometry['comparisons'][0]['mean_gain']:.1f} % on average" in page
    plain = np.array([increase(run) for run in sweep.baseline])
    cases = [np.array([increase(run) for run in sweep.of("margin@layers", 0.02)])]
    cases += [
        at_equal_cost(sweep, method, cost).increases("test", *PERTURBATIONS[0])
        for cost, method in ((0.005, "margin@layers"), (0.017, "margin@layers"), (0.017, "dropout"))
    ]
    for increases in cases:
        assert shown(100 * (increases - plain) / plain.mean()) in page
    for finding, digits in (("robustness", 1), ("clean", 2)):
        one_sided = found[finding, "one-sided@layers", "test"]["comparisons"][0]
        assert f"changes by {shown(changes_of(one_sided), digits)}" in page
    of_test, of_news = (found["first order", "margin@layers", split]["comparisons"][0] for split in ("test", "news"))
    assert f"is {shown(changes_of(of_test))} of the" in page
    assert f"({shown(changes_of(of_news)).replace(' (', ', ')}" in page
    assert of_test["equivalence_p_holm"] < 0.05 < of_news["equivalence_p_holm"]


def test_small_covariances_lower_the_clean_loss_and_raise_the_increase_as_the_page_says(sweep, findings_page):
    def changes(measure, strength):
        own, plain = (
            np.array([measure(run) for run in some])
            for some in (sweep.of("frobenius@layers", strength), sweep.baseline)
        )
        return 100 * (own - plain) / plain.mean()

    def established(measure, strength):
        tested = stats.ttest_1samp(changes(measure, strength), 0)
        return np.sign(tested.statistic) * (6 * tested.pvalue < 0.05)

    found = set()
    for strength, split in itertools.product(sweep.strengths("frobenius@layers"), ("test", "news")):
        clean, noise = partial(runs.clean_loss, split=split), partial(increase, split=split)
        if (established(clean, strength), established(noise, strength)) == (-1, 1):
            found.add((strength, split))
    assert found == {(0.003, "test"), (0.01, "test"), (0.003, "news"), (0.01, "news"), (0.03, "news")}
    clean = partial(runs.clean_loss, split="test")
    told = f"by {shown(changes(clean, 0.01), 2)} and by {shown(changes(increase, 0.01))} on test text"
    assert told in findings_page
    under_noise = changes(lambda run: clean(run) + increase(run), 0.01)
    assert f"changes by {shown(under_noise, 2)} on test text" in findings_page
    assert f"p = {6 * stats.ttest_1samp(under_noise, 0).pvalue:.2f} after multiplying by six" in findings_page
    quantiles = [
        np.mean([run["margins"]["layers"]["determinant_quantiles"]["0.01"] for run in some])
        for some in (sweep.baseline, sweep.of("frobenius@layers", 0.01))
    ]
    assert "from {:+.2f} to {:+.2f} (strength 0.01)".format(*quantiles) in findings_page


def test_the_committed_verdicts_are_those_of_the_committed_runs(record, sweep):
    again = analyse(sweep)
    parts = ("seeds", "rules", "overview", "equal_cost", "findings", "first_budget", "answers")
    assert json.loads(json.dumps({part: again[part] for part in parts})) == {part: record[part] for part in parts}
