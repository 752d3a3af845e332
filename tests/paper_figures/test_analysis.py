import itertools
import json

import numpy as np
import pytest
from matplotlib import pyplot as plt
from scipy import stats

from models.char_gpt import study
from paper_figures import effects, verdicts
from paper_figures.analysis import selection
from paper_figures.analysis.comparisons import Comparison, declared
from paper_figures.analysis.holm import holm
from paper_figures.analysis.paired import Paired, bootstrap_interval
from paper_figures.analysis.tables import markdown
from paper_figures.analysis.tests_of_means import equivalence_p, p_value, power, sign_flip_p
from paper_figures.analysis.verdicts import judge
from paper_figures.runs import load_runs
from tests.support.synthetic_runs import Truth, write_runs


def normals(n, mean=0.3, seed=0):
    return np.random.default_rng(seed).normal(mean, 1.0, n)


def test_the_bootstrap_of_few_seeds_is_that_of_every_resample():
    values = normals(4)
    means = [np.mean([values[i] for i in chosen]) for chosen in itertools.product(range(4), repeat=4)]
    np.testing.assert_allclose(bootstrap_interval(values), np.quantile(means, [0.025, 0.975]), rtol=1e-12)


def test_the_bootstrap_of_many_seeds_is_near_the_normal_interval_and_the_same_every_time():
    values = normals(400)
    half = 1.96 * values.std() / np.sqrt(400)
    np.testing.assert_allclose(
        bootstrap_interval(values), [values.mean() - half, values.mean() + half], atol=0.1 * half
    )
    assert bootstrap_interval(values) == bootstrap_interval(values)


def test_paired_figures_are_those_of_scipy():
    values = normals(5)
    found = Paired.of(values)
    interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose(found.t_interval, interval, rtol=1e-12)
    np.testing.assert_allclose(found.effect_size, values.mean() / values.std(ddof=1), rtol=1e-12)
    assert Paired.of(np.full(3, 0.1)).effect_size is None


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_p_values_are_those_of_scipy(alternative):
    values = normals(5)
    expected = stats.ttest_1samp(values, 0.1, alternative=alternative).pvalue
    np.testing.assert_allclose(p_value(values, 0.1, alternative), expected, rtol=1e-12)


def test_seeds_that_agree_decide_at_once_and_one_seed_never():
    assert p_value(np.full(5, 0.2)) == 0
    assert p_value(np.zeros(5)) == 1
    assert p_value(np.array([9.0])) == 1
    assert equivalence_p(np.zeros(5), 0.05) == 0


def test_equivalence_is_the_larger_of_two_one_sided_tests():
    values = 0.01 * normals(5)
    sides = (
        stats.ttest_1samp(values, -0.05, alternative="greater").pvalue,
        stats.ttest_1samp(values, 0.05, alternative="less").pvalue,
    )
    np.testing.assert_allclose(equivalence_p(values, 0.05), max(sides), rtol=1e-12)


def test_holm_on_an_example_by_hand():
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm(np.array([0.9, 0.8])), [1.0, 1.0])


@pytest.mark.parametrize(("effect", "level", "sides"), [(1.0, 0.05, 2), (2.0, 0.01, 1), (0.5, 0.05, 1)])
def test_power_is_the_share_of_simulated_studies_that_find_the_effect(effect, level, sides):
    draws = np.random.default_rng(1).normal(effect, 1.0, (200_000, 5))
    tests = stats.ttest_1samp(draws, 0, axis=1, alternative="two-sided" if sides == 2 else "greater")
    share = (tests.pvalue < level).mean()
    assert abs(power(1.0, 5, effect, level, sides) - share) < 5 * np.sqrt(share * (1 - share) / 200_000)


def test_the_sign_flip_test_cannot_go_below_its_floor():
    assert sign_flip_p(np.array([5.0, 6.0, 7.0, 8.0, 9.0])) == 2 / 2**5
    assert sign_flip_p(np.array([1.0, -1.0])) == 1.0


def judged(tmp_path, truths, **options):
    record = verdicts.analyse(load_runs(write_runs(tmp_path / "runs", truths, **options)))
    found = {(f["method"], f["finding"], f["split"]): f for f in record["findings"]}
    return record, found


def stepped_down(p_values):
    """Holm's adjusted p-values by definition: the smallest level at which the step-down procedure rejects each."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted = [0.0] * len(p_values)
    for step, place in enumerate(order):
        earlier = [(len(p_values) - k) * p_values[order[k]] for k in range(step + 1)]
        adjusted[place] = min(1.0, max(earlier))
    return adjusted


def test_holm_is_taken_over_all_methods_and_measures_of_a_finding_on_a_split():
    rng = np.random.default_rng(0)
    compared = [
        Comparison(finding, split, method, "ce", measure, True, 0.05, rng.normal(0.1, 0.1, 5))
        for finding, measures in (("robustness", "abc"), ("ours", "a"))
        for split in ("test", "news")
        for method in ("margin@layers", "map@layers")
        for measure in measures
    ]
    found = judge(compared)
    for finding, size in (("robustness", 6), ("ours", 2)):
        for split in ("test", "news"):
            family = [one for one in found if (one.comparison.finding, one.comparison.split) == (finding, split)]
            gains = [one.comparison.gains for one in family]
            for_it = [stats.ttest_1samp(g, 0).pvalue for g in gains]
            against_it = [stats.ttest_1samp(g, 0.05, alternative="less").pvalue for g in gains]
            assert [one.family_size for one in family] == [size] * size
            np.testing.assert_allclose([one.p_holm for one in family], stepped_down(for_it), rtol=1e-9)
            np.testing.assert_allclose([one.p_against_holm for one in family], stepped_down(against_it), rtol=1e-9)


def test_gains_are_shares_of_the_mean_of_plain_cross_entropy_whatever_they_are_over(tmp_path):
    truths = {"margin@layers": Truth(effect=-0.2), "jacobian": Truth(effect=0.5), "dropout": Truth(effect=-0.6)}
    folder = write_runs(tmp_path / "runs", truths, seeds=3, strengths=(0.01,))
    lines = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]

    def increases(method, split):
        return np.array(
            [
                row["increase"]
                for run in lines
                for row in run["splits"][split]["perturbed"]
                if run["method"] == method and (row["kind"], row["level"]) == ("relative-embedding-noise", 1.0)
            ]
        )

    compared = [c for c in declared(selection.select_all(load_runs(folder))) if c.method == "margin@layers"]
    for split in ("test", "news"):
        plain, own = increases("ce", split), increases("margin@layers", split)
        assert plain.shape == (3,)
        over = {c.against: c.gains for c in compared if (c.finding, c.split) == ("ours", split)}
        for other in ("jacobian", "dropout"):
            np.testing.assert_allclose(over[other], (increases(other, split) - own) / plain.mean(), rtol=1e-12)
        (robust,) = [c.gains for c in compared if (c.finding, c.split, c.decides) == ("robustness", split, True)]
        np.testing.assert_allclose(robust, (plain - own) / plain.mean(), rtol=1e-12)


def test_one_seed_has_no_interval_and_every_verdict_says_so(tmp_path):
    assert Paired.of(np.array([0.2])) == ((0.2,), 0.2, None, None, None)
    record, found = judged(tmp_path, {"margin@layers": Truth(effect=-0.9, crossings=0.0)}, seeds=1)
    json.dumps(record, allow_nan=False)
    assert {entry["verdict"] for name, entry in found.items() if name[1] != "ours"} == {"undecided"}
    for entry in record["findings"]:
        for comparison in entry["comparisons"]:
            assert comparison["bootstrap_interval"] is comparison["t_interval"] is comparison["effect_size"] is None
            assert (comparison["p"], comparison["power"]) == (1.0, 0.0)
    assert (
        "% less than ce's (one seed, so no interval; p = 1;" in found["margin@layers", "robustness", "test"]["sentence"]
    )
    (row,) = [row for row in record["overview"] if (row["method"], row["split"]) == ("margin@layers", "test")]
    assert row["change_interval"] is row["perturbations"][0]["change_interval"] is None
    assert f"{row['change_percent']:+.2f} % (one seed, no interval)" in markdown(record)
    figure = effects.draw(tmp_path / "runs")
    methods = len({run["method"] for run in load_runs(tmp_path / "runs").lines}) - 1
    points = [line for panel in figure.axes for line in panel.lines if line.get_marker() not in ("", "None", None)]
    assert len(points) == methods * len([panel for panel in figure.axes if panel.lines])
    plt.close(figure)


def test_verdicts_are_the_truth_that_was_put_in(tmp_path):
    truths = {
        "margin@layers": Truth(effect=-0.2, crossings=0.0),
        "margin@embedding": Truth(),
        "map@layers": Truth(effect=0.3),
        "dropout": Truth(effect=-0.1),
    }
    _, found = judged(tmp_path, truths)
    for split in ("test", "news"):
        assert found["margin@layers", "robustness", split]["verdict"] == "supported"
        assert found["margin@layers", "ours", split]["verdict"] == "supported"
        # Tight seeds and no effect: equivalence is shown, not left open.
        assert found["margin@embedding", "robustness", split]["verdict"] == "not supported"
        assert found["map@layers", "robustness", split]["verdict"] == "not supported"
        assert found["margin@embedding", "ours", split]["verdict"] == "not supported"


def test_seeds_that_scatter_leave_it_undecided_with_the_power_reached(tmp_path):
    _, found = judged(tmp_path, {"margin@layers": Truth(effect=-0.1)}, spread=0.3)
    entry = found["margin@layers", "robustness", "test"]
    assert entry["verdict"] == "undecided"
    deciding = next(c for c in entry["comparisons"] if c["decides"])
    assert deciding["power_in_family"] < deciding["power"] < 0.5
    assert "power" in entry["sentence"]


def test_a_barrier_that_one_competitor_beats_is_not_more_than_a_regulariser(tmp_path):
    truths = {"margin@layers": Truth(effect=-0.2), "jacobian": Truth(effect=-0.4)}
    _, found = judged(tmp_path, truths)
    assert found["margin@layers", "robustness", "test"]["verdict"] == "supported"
    assert found["margin@layers", "ours", "test"]["verdict"] == "not supported"


def test_a_gain_by_larger_embeddings_is_called_one(tmp_path):
    truth = Truth(kinds={"embedding-noise": -0.3}, rescale=2.0)
    _, found = judged(tmp_path, {"margin@embedding": truth})
    entry = found["margin@embedding", "robustness", "test"]
    assert entry["verdict"] == "not supported"
    assert "it wins by rescaling, which is no robustness" in entry["sentence"]


def test_the_strength_is_the_largest_within_the_budget_or_else_the_cheapest(tmp_path):
    truths = {"dropout": Truth(cost=0.05), "jacobian": Truth(cost=5.0), "spectral": Truth(cost=-0.01)}
    runs = load_runs(write_runs(tmp_path / "runs", truths, strengths=(0.01, 0.1, 1.0)))
    # 0.05 x 0.1 is within 1 %, 0.05 x 1 is not; 5 x 0.01 is not either.
    assert (selection.select(runs, "dropout").strength, selection.select(runs, "dropout").within_budget) == (0.1, True)
    assert (selection.select(runs, "jacobian").strength, selection.select(runs, "jacobian").within_budget) == (
        0.01,
        False,
    )
    assert selection.select(runs, "spectral").strength == 1.0


def test_only_seeds_with_every_run_are_used(tmp_path):
    folder = write_runs(tmp_path / "runs", {}, seeds=3)
    path = folder / "runs.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    assert load_runs(folder).seeds == (0, 1)
    path.write_text("")
    with pytest.raises(ValueError, match=r"--runs: .* has no seed with all its runs and ce; finish it with python -m"):
        load_runs(folder)


def test_a_first_seed_cut_short_is_not_taken_for_a_whole_one(tmp_path):
    profile = study.PROFILES["smoke"]
    example = json.loads((write_runs(tmp_path / "made-up", {}, seeds=1) / "runs.jsonl").read_text().splitlines()[0])
    configs = [config for config in study.configurations(profile) if config.seed == 0]
    runs = [
        example | {"profile": "smoke", "method": config.method, "strength": config.strength, "seed": 0}
        for config in configs
    ]
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(json.dumps(run) + "\n" for run in runs))
    assert load_runs(tmp_path).seeds == (0,)
    path.write_text("".join(json.dumps(run) + "\n" for run in runs[:-1]))
    with pytest.raises(ValueError, match="has no seed with all its runs"):
        load_runs(tmp_path)
