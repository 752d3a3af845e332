import itertools
import json
import re

import numpy as np
import pytest
from matplotlib import pyplot as plt
from scipy import stats

from paper_figures.figures import effects
from paper_figures.study import design
from paper_figures.study import strength_selection as selection
from paper_figures.study.analysis import analyse
from paper_figures.study.comparisons import declared
from paper_figures.study.design import BARRIERS, COMPETITORS, CONTROLS
from paper_figures.study.runs import increase, load_runs
from paper_figures.study.strength_selection import at_equal_cost
from paper_figures.study.tables import markdown
from tests.helpers.synthetic_runs import Truth, write_runs


def edited(folder, change):
    """The folder, with every line of its runs as `change` leaves it."""
    path = folder / "runs.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    change(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def mean_clean(members):
    """Of the clean loss on validation text."""
    return np.mean([run["splits"]["validation"]["clean"]["nats_per_character"] for run in members])


# Every competitor costs something, so that all can be had at one clean cost.
COSTLY = {method: Truth(cost=0.06) for method in COMPETITORS}


def judged(tmp_path, truths, **options):
    return judged_in(write_runs(tmp_path / "runs", truths, **options))


def judged_in(folder):
    record = analyse(load_runs(folder))
    found = {(f["method"], f["finding"], f["split"]): f for f in record["findings"]}
    return record, found


def test_verdicts_are_the_truth_that_was_put_in(tmp_path):
    truths = COSTLY | {
        "margin@layers": Truth(effect=-0.2, crossings=0.0, cost=0.06),
        "margin@embedding": Truth(cost=0.06),
        "map@layers": Truth(effect=0.3),
        "dropout": Truth(effect=-0.1, cost=0.06),
    }
    record, found = judged(tmp_path, truths)
    expected = {("margin@layers", finding): "supported" for finding in ("robustness", "clean", "ours")}
    # Tight seeds and no effect: equivalence is shown, not left open.
    null = (("margin@embedding", "robustness"), ("map@layers", "robustness"), ("margin@embedding", "ours"))
    expected |= dict.fromkeys(null, "not supported")
    for split in ("test", "news"):
        assert {pair: found[*pair, split]["verdict"] for pair in expected} == expected
    assert found["margin@layers", "geometry", "validation"]["verdict"] == "supported"
    assert "On test text robustness at a clean cost below 1 % is supported for margin@layers" in record["answers"][0]
    assert "the loss of margin@layers rises less than that of dropout" in record["answers"][1]


def test_gains_are_shares_of_the_mean_of_plain_cross_entropy_whatever_they_are_over(tmp_path):
    truths = {
        "margin@layers": Truth(effect=-0.2, cost=0.6),
        "jacobian": Truth(effect=0.5, cost=0.6),
        "dropout": Truth(effect=-0.6, cost=0.6),
    }
    runs = load_runs(write_runs(tmp_path / "runs", truths, seeds=3, strengths=(0.01,)))

    def values(method, split):
        """Increases by seed, and the mean clean loss on validation text."""
        members = runs.of(method, runs.strengths(method)[0])
        return np.array([increase(run, split, "relative-embedding-noise", 1.0) for run in members]), mean_clean(members)

    selections = selection.select_all(runs)
    priced = {method: at_equal_cost(runs, method) for method in runs.methods}
    compared = [c for c in declared(selections, priced) if c.method == "margin@layers"]
    for split in ("test", "news"):
        plain, reference = values("ce", split)

        def at_cost(method, split=split, plain=plain, reference=reference):
            own, clean = values(method, split)
            weight = 0.005 / (clean / reference - 1)
            return (1 - weight) * plain + weight * own

        over = {c.against: c.gains for c in compared if (c.finding, c.split) == ("ours", split)}
        for other in ("jacobian", "dropout"):
            expected = (at_cost(other) - at_cost("margin@layers")) / plain.mean()
            np.testing.assert_allclose(over[other], expected, rtol=1e-9)
        (robust,) = [c.gains for c in compared if (c.finding, c.split, c.decides) == ("robustness", split, True)]
        np.testing.assert_allclose(robust, (plain - values("margin@layers", split)[0]) / plain.mean(), rtol=1e-9)


def test_one_seed_has_no_interval_and_every_verdict_says_so(tmp_path):
    record, found = judged(tmp_path, COSTLY | {"margin@layers": Truth(effect=-0.9, crossings=0.0, cost=0.06)}, seeds=1)
    json.dumps(record, allow_nan=False)
    assert {entry["verdict"] for entry in found.values()} == {"undecided", "not tested"}
    for comparison in itertools.chain.from_iterable(entry["comparisons"] for entry in record["findings"]):
        said = [comparison[name] for name in ("t_interval", "effect_size", "p", "power")]
        assert said == [None, None, 1.0, 0.0]
    assert "(one seed, no interval), p = 1" in found["margin@layers", "robustness", "test"]["sentence"]
    (row,) = [row for row in record["overview"] if (row["method"], row["split"]) == ("margin@layers", "test")]
    assert row["change_interval"] is row["perturbations"][0]["change_interval"] is None
    assert "one seed, no interval" in markdown(record)
    sweep = load_runs(tmp_path / "runs")
    figure = effects.draw(sweep)
    points = [line for panel in figure.axes for line in panel.lines if line.get_marker() not in ("", "None", None)]
    assert len(points) == (len(sweep.methods) - 1) * len([panel for panel in figure.axes if panel.lines])
    plt.close(figure)


def test_seeds_that_scatter_leave_it_undecided_with_the_power_reached(tmp_path):
    _, found = judged(tmp_path, {"margin@layers": Truth(effect=-0.1)}, spread=0.3)
    entry = found["margin@layers", "robustness", "test"]
    assert entry["verdict"] == "undecided"
    deciding = next(c for c in entry["comparisons"] if c["decides"])
    assert deciding["power_in_family"] == deciding["power"] < 0.5
    assert "power" in entry["sentence"]
    assert found["margin@layers", "robustness", "news"]["verdict"] == "not tested"


def test_a_barrier_that_one_competitor_beats_is_not_more_than_a_regulariser(tmp_path):
    truths = COSTLY | {
        "margin@layers": Truth(effect=-0.2, cost=0.06),
        "jacobian": Truth(effect=-0.4, cost=0.06),
        "dropout": Truth(effect=-0.2, cost=0.06),
    }
    record, found = judged(tmp_path, truths)
    assert found["margin@layers", "robustness", "test"]["verdict"] == "supported"
    assert found["margin@layers", "ours", "test"]["verdict"] == "not supported"
    answer = record["answers"][1]
    assert "rises more than that of jacobian +20" in answer.replace("+19", "+20").replace("+21", "+20")
    assert "of 5 % or more is ruled out against dropout" in answer


def test_a_gain_by_larger_embeddings_is_described_and_is_no_verdict(tmp_path):
    truths = {
        "margin@embedding": Truth(kinds={"embedding-noise": -0.3}, rescale=2.0),
        "map@embedding": Truth(effect=-0.3, rescale=2.0),
        "map@layers": Truth(effect=0.6, kinds={"embedding-noise": 0.3}, rescale=2.0),
    }
    record, found = judged(tmp_path, truths)
    assert found["margin@embedding", "robustness", "test"]["verdict"] == "not supported"
    told = [re.findall(r"(\S+) gains more under noise of fixed size", answer) for answer in record["answers"]]
    assert set(itertools.chain.from_iterable(told)) == {"margin@embedding"}


def test_methods_over_the_budget_or_without_an_effect_on_any_model_are_not_tested(tmp_path):
    def without_effect(lines):
        plain = {run["seed"]: run for run in lines if run["method"] == "ce"}
        for run in lines:
            if run["method"] == "one-sided@embedding":
                run["splits"] = plain[run["seed"]]["splits"]

    truths = {"margin@layers": Truth(effect=-0.2), "map@layers": Truth(cost=5.0, effect=-0.5)}
    _, found = judged_in(edited(write_runs(tmp_path / "runs", truths), without_effect))
    for method, note in (
        ("map@layers", "costs more than the clean-loss budget"),
        ("one-sided@embedding", "are those of ce"),
    ):
        entry = found[method, "robustness", "test"]
        assert (entry["verdict"], note in entry["note"]) == ("not tested", True)
        assert entry["one_family_verdict"] != "not tested"


def test_shares_past_the_boundary_are_compared_within_a_seed(tmp_path):
    # Those of ce and of margin@layers at 0.02 in the full study, and a sixth seed without any.
    shares = {"ce": (0.0127, 0.0050, 0.0464, 0.0112, 0.0), "margin@layers": (0.0, 0.0, 0.0001, 0.0, 0.00006)}

    def with_shares(lines):
        for run in lines:
            if run["method"] in shares:
                run["margins"]["layers"]["negative_share"] = shares[run["method"]][run["seed"]]

    _, found = judged_in(edited(write_runs(tmp_path / "runs", {}), with_shares))
    deciding = found["margin@layers", "geometry", "validation"]["comparisons"][0]
    plain, own = shares.values()
    expected = [1 - o / p for o, p in zip(own, plain, strict=True) if p > 0]
    np.testing.assert_allclose(deciding["gains"], expected)
    np.testing.assert_allclose(deciding["p"], stats.ttest_1samp(expected, 0).pvalue)
    assert deciding["verdict"] == "supported"
    # As shares of the mean of ce the same seeds scatter widely, which decided nothing.
    pooled = (np.array(plain) - np.array(own)) / np.mean(plain)
    assert stats.ttest_1samp(pooled, 0).pvalue > 0.05


def test_one_clean_cost_is_reached_between_two_strengths(tmp_path):
    folder = write_runs(
        tmp_path / "runs", {"dropout": Truth(cost=0.06), "jacobian": Truth(cost=-0.01)}, strengths=(0.02, 0.2)
    )
    runs = load_runs(folder)
    found = at_equal_cost(runs, "dropout")
    assert found.strengths == (0.02, 0.2)
    base, *clean = (mean_clean(some) for some in (runs.baseline, *(runs.of("dropout", s) for s in (0.02, 0.2))))
    # The interpolated cost is the declared one, and the increases are NumPy's interpolation of every seed.
    costs = [loss / base - 1 for loss in clean]
    np.testing.assert_allclose((1 - found.weight) * costs[0] + found.weight * costs[1], 0.005, rtol=1e-9)
    expected = [
        np.interp(0.005, costs, [increase(r, "test", "substitution", 0.05) for r in pair])
        for pair in zip(runs.of("dropout", 0.02), runs.of("dropout", 0.2), strict=True)
    ]
    np.testing.assert_allclose(found.increases("test", "substitution", 0.05), expected, rtol=1e-9)
    assert at_equal_cost(runs, "dropout", 0.0001).strengths == (0.0, 0.02)
    assert "never reaches a clean cost of 0.5 % (at most" in at_equal_cost(runs, "jacobian")


def test_a_line_between_strengths_far_apart_is_described_and_not_tested(tmp_path):
    # No strength of jacobian costs less than 5 %, and a long line alone leaves little of any effect.
    truths = COSTLY | {"margin@layers": Truth(effect=-0.2, cost=0.06), "jacobian": Truth(effect=-0.9, cost=5.0)}
    _, found = judged(tmp_path, truths)
    entry = found["margin@layers", "ours", "test"]
    verdicts_on = {c["against"]: c["verdict"] for c in entry["comparisons"]}
    assert verdicts_on.pop("jacobian") == "not tested"
    assert set(verdicts_on.values()) == {"supported"}
    assert "jacobian is interpolated between strengths whose clean costs lie 5.0" in entry["note"]


def test_methods_of_the_first_order_have_questions_of_their_own(tmp_path):
    truths = COSTLY | {
        "margin@layers": Truth(effect=-0.2, cost=0.06),
        "trace@layers": Truth(effect=-0.2, cost=0.06),
        "frobenius@layers": Truth(effect=0.1, cost=-0.01),
    }
    record, found = judged(tmp_path, truths)
    assert found["margin@layers", "first order", "test"]["verdict"] == "not supported"
    for measure in ("clean", "noise"):
        assert found["frobenius@layers", f"small moments, {measure}", "test"]["verdict"] == "supported"
    assert {method for method, finding, _ in found if finding in ("robustness", "ours")} == set(BARRIERS)
    assert any(
        "margin@layers is, within 5 %, equivalent to its first order trace@layers" in a for a in record["answers"]
    )
    assert any(a.startswith("Small moments, clean, frobenius@layers") for a in record["answers"])
    assert all(method in markdown(record) for method in CONTROLS)
    record, found = judged(tmp_path / "apart", truths | {"trace@layers": Truth(effect=-0.1, cost=0.06)})
    assert found["margin@layers", "first order", "test"]["verdict"] == "supported"


def test_the_strength_is_the_largest_within_the_budget_or_else_the_cheapest(tmp_path):
    truths = {"dropout": Truth(cost=0.03), "jacobian": Truth(cost=5.0), "spectral": Truth(cost=-0.01)}
    runs = load_runs(write_runs(tmp_path / "runs", truths, strengths=(0.01, 0.1, 0.25, 1.0)))

    # 0.03 x 0.1 is within 0.5 %, 0.03 x 0.25 within 1 %; 5 x 0.01 is within neither.
    def strength(method, budget=selection.BUDGET):
        found = selection.select(runs, method, budget)
        return found.strength, found.within_budget

    assert strength("dropout", selection.FIRST_BUDGET) == (0.25, True)
    found = {method: strength(method) for method in truths}
    assert found == {"dropout": (0.1, True), "jacobian": (0.01, False), "spectral": (1.0, True)}


def test_only_seeds_with_every_run_are_used(tmp_path):
    folder = edited(write_runs(tmp_path / "runs", {}, seeds=3), lambda lines: lines.pop())
    assert load_runs(folder).seeds == (0, 1)
    with pytest.raises(ValueError, match=r"--runs: .* has no seed with all its runs and ce; finish it with python -m"):
        load_runs(edited(folder, list.clear))


def test_a_first_seed_cut_short_is_not_taken_for_a_whole_one(tmp_path):
    def of_smoke(lines):
        planned = [one for one in design.designs(design.PROFILES["smoke"]) if one.base.seed == 0]
        lines[:] = [lines[0] | {"profile": "smoke", "method": p.method, "strength": p.strength} for p in planned]

    folder = edited(write_runs(tmp_path / "runs", {}, seeds=1), of_smoke)
    assert load_runs(folder).seeds == (0,)
    with pytest.raises(ValueError, match="has no seed with all its runs"):
        load_runs(edited(folder, lambda lines: lines.pop()))


def test_the_verdicts_are_over_seeds_and_the_same_without_standard_errors(tmp_path):
    found = []
    for drop in (False, True):
        folder = write_runs(tmp_path / str(drop), {}, seeds=3)
        path = folder / "runs.jsonl"
        text = path.read_text(encoding="utf-8")
        assert '"increase_standard_error"' in text
        if drop:
            text = re.sub(r'("(?:increase_)?standard_error": )[0-9.e-]+', r"\1null", text)
            assert '"standard_error": null' in text
        path.write_text(text, encoding="utf-8")
        found.append(analyse(load_runs(folder)))
    assert found[0] == found[1]
