"""Paired rounds against a clock that only moves when told to, and ratios of made-up numbers."""

import pytest

from benchmarks.timing import PAUSE_SECONDS, paired_rounds, ratio, spread


def test_every_contestant_runs_twice_in_a_row_a_round_in_an_order_rotated_by_one(clock):
    calls = []
    contestants = {name: lambda name=name: calls.append(name) for name in "abc"}
    paired_rounds(contestants, 4, "test")
    assert [calls[i : i + 6] for i in range(0, 24, 6)] == [
        ["a", "a", "b", "b", "c", "c"],
        ["b", "b", "c", "c", "a", "a"],
        ["c", "c", "a", "a", "b", "b"],
        ["a", "a", "b", "b", "c", "c"],
    ]


def test_seconds_are_those_of_the_second_run_without_the_pause(clock):
    runs = {"slow": iter([100.0, 3.0, 40.0, 5.0]), "fast": iter([50.0, 1.0, 20.0, 2.0])}
    contestants = {name: lambda left=left: clock.sleep(next(left)) for name, left in runs.items()}
    found = paired_rounds(contestants, 2, "test")
    assert found["slow"] == pytest.approx([3, 5])
    assert found["fast"] == pytest.approx([1, 2])
    assert clock.now == pytest.approx(221 + 4 * PAUSE_SECONDS)


def test_a_ratio_is_the_median_of_ratios_and_not_the_ratio_of_medians():
    over, under = [1.0, 2.0, 30.0], [1.0, 20.0, 3.0]
    assert ratio(over, under) == {"median": 1.0, "low": 0.1, "high": 10.0}
    assert spread(over)["median"] / spread(under)["median"] == pytest.approx(2 / 3)
    assert ratio(over, under, 4.0) == {"median": 4.0, "low": 0.4, "high": 40.0}


def test_rounds_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="under: has 1 rounds and over 2; pass timings of the same rounds"):
        ratio([1.0, 2.0], [1.0])
