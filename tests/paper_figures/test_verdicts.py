import itertools

import numpy as np
import pytest
from scipy import stats

from paper_figures.study import verdicts as rules
from paper_figures.study.comparisons import PRIMARY, Comparison
from paper_figures.study.paired_tests import Paired, equivalence_p, holm, p_value, power, spread
from paper_figures.study.verdicts import judge


def normals(n, mean=0.3, seed=0):
    return np.random.default_rng(seed).normal(mean, 1.0, n)


def test_paired_figures_are_those_of_scipy():
    values = normals(5)
    found = Paired.of(values)
    interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose(found.t_interval, interval, rtol=1e-12)
    np.testing.assert_allclose(found.effect_size, values.mean() / values.std(ddof=1), rtol=1e-12)
    assert Paired.of(np.full(3, 0.1)).effect_size is None


def test_what_one_seed_cannot_say_stays_undefined():
    assert Paired.of(np.array([0.2])) == ((0.2,), 0.2, None, None)
    assert np.isnan(spread(np.array([0.2])))


def test_the_interval_of_five_seeds_holds_the_mean_as_often_as_it_says():
    studies = np.random.default_rng(5).normal(0.3, 2.0, (4000, 5))
    held = np.mean([low < 0.3 < high for low, high in (Paired.of(study).t_interval for study in studies)])
    assert abs(held - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 4000)


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_p_values_are_those_of_scipy(alternative):
    values = normals(5)
    expected = stats.ttest_1samp(values, 0.1, alternative=alternative).pvalue
    np.testing.assert_allclose(p_value(values, 0.1, alternative), expected, rtol=1e-12)


def test_seeds_that_agree_decide_at_once_and_one_seed_never():
    assert [p_value(np.array(values)) for values in ([0.2] * 5, [0.0] * 5, [9.0])] == [0, 1, 1]
    assert equivalence_p(np.zeros(5), 0.05) == 0


def larger_of_two_tests(values, margin):
    sides = ((-margin, "greater"), (margin, "less"))
    return max(stats.ttest_1samp(values, edge, alternative=side).pvalue for edge, side in sides)


def test_equivalence_is_the_larger_of_two_one_sided_tests():
    values = 0.01 * normals(5)
    np.testing.assert_allclose(equivalence_p(values, 0.05), larger_of_two_tests(values, 0.05), rtol=1e-12)


def test_holm_on_an_example_by_hand():
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm(np.array([0.9, 0.8])), [1.0, 1.0])


def stepped_down(p_values):
    """Holm's adjusted p-values by definition: the smallest level at which the step-down procedure rejects each."""
    ordered = sorted(p_values)
    return [
        min(1.0, max((len(ordered) - k) * smaller for k, smaller in enumerate(ordered) if smaller <= p))
        for p in p_values
    ]


def test_holm_in_one_family_is_taken_over_all_methods_and_measures_of_a_finding_on_a_split():
    rng = np.random.default_rng(0)
    compared = [
        Comparison(finding, split, method, "ce", measure, True, 0.05, rng.normal(0.1, 0.1, 5))
        for finding, measures in (("robustness", "abc"), ("ours", "a"))
        for split in ("test", "news")
        for method in ("margin@layers", "map@layers")
        for measure in measures
    ]
    found = judge(compared, primary_first=False)
    for (finding, size), split in itertools.product({"robustness": 6, "ours": 2}.items(), ("test", "news")):
        family = [one for one in found if (one.comparison.finding, one.comparison.split) == (finding, split)]
        for_it = [stats.ttest_1samp(one.comparison.gains, 0).pvalue for one in family]
        against = [stats.ttest_1samp(one.comparison.gains, 0.05, alternative="less").pvalue for one in family]
        against_it = [min(1, 2 * p) for p in against]
        assert [one.family_size for one in family] == [size] * size
        np.testing.assert_allclose([one.p_holm for one in family], stepped_down(for_it), rtol=1e-9)
        np.testing.assert_allclose([one.p_against_holm for one in family], stepped_down(against_it), rtol=1e-9)


@pytest.mark.parametrize(("effect", "level", "sides"), [(1.0, 0.05, 2), (2.0, 0.01, 1), (0.5, 0.05, 1)])
def test_power_is_the_share_of_simulated_studies_that_find_the_effect(effect, level, sides):
    draws = np.random.default_rng(1).normal(effect, 1.0, (200_000, 5))
    tests = stats.ttest_1samp(draws, 0, axis=1, alternative="two-sided" if sides == 2 else "greater")
    share = (tests.pvalue < level).mean()
    assert abs(power(1.0, 5, effect, level, sides) - share) < 5 * np.sqrt(share * (1 - share) / 200_000)


def simulated(n_methods, means, n, random, finding="robustness"):
    """Comparisons of a finding with standard normal gains: the primary one first, then those of other methods."""
    return [
        Comparison(
            finding, "test", PRIMARY if k == 0 else f"other {k}", "ce", "x", True, 1.0, random.normal(mean, 1.0, n)
        )
        for k, mean in zip(range(n_methods), means, strict=True)
    ]


@pytest.mark.parametrize("claim", ["better", "not worse", "different"])
def test_a_verdict_on_one_comparison_is_what_its_interval_says(claim):
    seen = set()
    for seed in range(200):
        gains = np.random.default_rng(seed).normal((seed % 9) / 2 - 2, 0.5, 5)
        low, high = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
        expected = {
            "better": "not supported" if high < 1 else "supported" if low > 0 else "undecided",
            "not worse": "supported" if low > -1 else "not supported" if high < -1 else "undecided",
            "different": "not supported"
            if low > -1 and high < 1
            else "supported"
            if low > 0 or high < 0
            else "undecided",
        }[claim]
        (found,) = judge([Comparison("robustness", "test", PRIMARY, "ce", "x", True, 1.0, gains, claim=claim)])
        assert found.verdict == expected
        seen.add(expected)
    assert seen == {"supported", "not supported", "undecided"}


@pytest.mark.slow
# No gain anywhere; a real gain of the primary method alone; gains of exactly the smallest effect.
@pytest.mark.parametrize(
    ("means", "wrong"),
    [
        ([0, 0, 0, 0], "supported"),
        ([9, 0, 0, 0], "supported"),
        ([1, 1, 1, 1], "not supported"),
        ([9, 1, 1, 1], "not supported"),
    ],
)
def test_a_wrong_verdict_in_a_finding_is_as_rare_as_declared(means, wrong, monkeypatch):
    monkeypatch.setattr(rules, "power", lambda *arguments: 0.0)
    random, studies = np.random.default_rng(11), 1000
    false = [place for place, mean in enumerate(means) if mean < 9]
    share = np.mean(
        [
            any(found[place].verdict == wrong for place in false)
            for found in (judge(simulated(4, means, 5, random)) for _ in range(studies))
        ]
    )
    assert share < 0.05 + 3 * np.sqrt(0.05 * 0.95 / studies)


def test_nothing_is_tested_before_the_primary_comparison_is_decided():
    random = np.random.default_rng(2)
    undecided, *others = simulated(3, [0.4, 30, 30], 5, random)
    found = judge([undecided, *others])
    assert [one.verdict for one in found] == ["undecided", "not tested", "not tested"]
    assert found[1].untested == "the primary comparison is undecided or not tested"
    decided = undecided._replace(gains=random.normal(30, 1, 5))
    assert [one.verdict for one in judge([decided, *others])] == ["supported"] * 3


def test_what_is_significantly_worse_is_never_supported():
    random = np.random.default_rng(6)
    first, second, third = simulated(3, [30, 30, 0], 5, random)
    spread_out = random.normal(0, 1, 5)
    # p = 0.04 by a mean below 0; against the smallest effect Holm's factor of 2 leaves more than 5 %.
    t = stats.t.isf(0.02, 4)
    worse = spread_out - spread_out.mean() - t * spread_out.std(ddof=1) / np.sqrt(5)
    *_, found = judge([first, second, third._replace(gains=worse, smallest_effect=1e-3)])
    np.testing.assert_allclose(found.p_holm, 0.04)
    assert found.p_against_holm > 0.05
    assert found.verdict == "not supported"


def test_what_is_not_tested_makes_no_family_larger():
    random = np.random.default_rng(3)
    first, second, third, fourth = simulated(4, [30, 30, 30, 30], 5, random)
    found = judge([first, second, third._replace(decides=False), fourth._replace(excluded="over the budget")])
    assert [one.family_size for one in found] == [1, 1, 0, 0]
    assert [one.verdict for one in found] == ["supported", "supported", "not tested", "not tested"]
    in_one_family = judge([first, second, third._replace(decides=False), fourth], primary_first=False)
    assert [one.family_size for one in in_one_family] == [4] * 4


def test_p_values_of_a_family_are_corrected_and_equivalence_too():
    comparisons = simulated(4, [30, 0, 0.1, 0.2], 5, np.random.default_rng(4))
    _, *found = judge(comparisons)
    by_hand = [min(1, 2 * larger_of_two_tests(one.gains, 1)) for one in comparisons[1:]]
    np.testing.assert_allclose([one.equivalence_p for one in found], by_hand, rtol=1e-10)
    np.testing.assert_allclose([one.equivalence_p_holm for one in found], stepped_down(by_hand), rtol=1e-10)
