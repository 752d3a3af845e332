"""What sections make of their measurements, by contestants whose times and memory are made up."""

import numpy as np
import pytest

from benchmarks import agreement, kernel_time, peak_memory, training_step
from benchmarks.contestants import CLOSED_FORM, FAST, TORCH, Contestant
from benchmarks.problem_sizes import QUICK, draw_cells
from benchmarks.result_tables import at_least, at_most, is_met
from benchmarks.timing import matmul
from benchmarks.training_step import BFLOAT16, EXACT, PLAIN, REFERENCE, SUBSAMPLED, configurations


def takes(clock, seconds):
    return lambda *_: lambda *_: clock.sleep(seconds)


def figures(found):
    return {target["what"]: target["figure"] for target in found["targets"]}


def rows(found, key="name"):
    return {row[key]: row for row in found["rows"]}


def test_a_bound_is_kept_on_its_own_side_only():
    assert [is_met(at_most("", figure, 0.25)) for figure in (0.2, 0.25, 0.3, None)] == [True, True, False, None]
    assert [is_met(at_least("", figure, 0.25)) for figure in (0.2, 0.25, 0.3, None)] == [False, True, True, None]


def test_training_step_ratios_are_to_the_plain_step(clock, monkeypatch):
    seconds = {PLAIN: 2.0, EXACT: 4.0, SUBSAMPLED: 2.5, BFLOAT16: 3.0, REFERENCE: 20.0}
    by_config = {config: seconds[name] for name, config in configurations(QUICK).items()}
    monkeypatch.setattr(training_step, "prepare", lambda sizes, config: takes(clock, by_config[config])())
    found = training_step.run_steps(QUICK)
    assert {name: row["to_plain"]["median"] for name, row in rows(found).items()} == pytest.approx(
        {PLAIN: 1, EXACT: 2, SUBSAMPLED: 1.25, BFLOAT16: 1.5, REFERENCE: 10}
    )
    assert list(figures(found).values()) == pytest.approx([2, 1.25])
    assert all(len(row["seconds"]) == QUICK.rounds >= 7 for row in found["rows"])


def test_the_steps_differ_in_their_barrier_alone():
    found = {name: config.as_dict() for name, config in configurations(QUICK).items()}
    changed = {
        name: {key: value for key, value in config.items() if value != found[EXACT][key]}
        for name, config in found.items()
    }
    assert changed == {
        PLAIN: {"objective": "ce", "implementation": "reference"},
        EXACT: {},
        SUBSAMPLED: {"barrier_share": QUICK.share},
        BFLOAT16: {"product_dtype": "bfloat16"},
        REFERENCE: {"implementation": "reference"},
    }
    assert found[EXACT]["barrier_site"] == "layers"
    # The step: batch 8, length 256, width 128, 4 heads of 32, 4 layers.
    full = configurations(type(QUICK)())[EXACT]
    assert (full.batch, full.context, full.width, full.heads, full.layers) == (8, 256, 128, 4, 4)


@pytest.mark.parametrize("installed", [True, False])
def test_kernel_ratios_compare_times_a_cell_and_the_share_counts_the_causal_half(clock, monkeypatch, installed):
    def made_up(name, seconds):
        return lambda *_: Contestant(name, takes(clock, seconds))

    monkeypatch.setattr(
        kernel_time, "matmul", lambda size, dtype="float32": takes(clock, {"float32": 0.5}.get(dtype, 0.1))()
    )
    monkeypatch.setattr(kernel_time, "fast", lambda *given: Contestant(given[1] if given else FAST, takes(clock, 2.0)))
    monkeypatch.setattr(kernel_time, "subsampled", made_up("sampled", 1.0))
    monkeypatch.setattr(kernel_time, "closed_form", made_up(CLOSED_FORM, 10.0))
    monkeypatch.setattr(kernel_time, "autodiff", made_up(kernel_time.AUTODIFF, 30.0))
    torch = made_up(TORCH, 8.0) if installed else lambda *_: Contestant(TORCH, None, missing="not installed")
    monkeypatch.setattr(kernel_time, "by_torch", torch)
    found = kernel_time.run_kernel(QUICK)
    by_name = rows(found)
    assert by_name[CLOSED_FORM]["fast_over_this"]["median"] == pytest.approx(0.2)
    # 2 s on 4 cells against 30 s on 2: a thirtieth a cell.
    assert (by_name[FAST]["cells"], by_name[kernel_time.AUTODIFF]["cells"]) == (4, 2)
    assert by_name[kernel_time.AUTODIFF]["fast_over_this"]["median"] == pytest.approx(1 / 30)
    assert by_name[kernel_time.AUTODIFF]["time_a_cell"] == pytest.approx(15)
    # 3 products of n (n / 2) x p^2 multiplications and additions for each of 4 cells in 2 s; 2 m^3 in half a second.
    work, rate = 3 * 4 * (16 * 16 / 2) * 4**2 * 2, 2 * QUICK.matmul**3 / 0.5
    assert figures(found)["fast exact, share of the machine's rate"] == pytest.approx(work / 2 / rate)
    assert by_name[kernel_time.BFLOAT16]["share_of_matmul"]["median"] == pytest.approx(work / 2 / (5 * rate))
    assert by_name[kernel_time.MATMUL]["operations_a_second"] == pytest.approx(rate)
    assert figures(found)["fast exact / straightforward PyTorch"] == (pytest.approx(0.25) if installed else None)
    assert ("missing" in by_name[TORCH]) is not installed


def test_scaling_divides_by_the_square_of_the_length(clock, monkeypatch):
    # A third more than quadratic at the longest.
    extra = {16: 1.0, 32: 1.0, 64: 0.9, 128: 1.3}

    def prepare(queries, keys):
        length = queries.shape[-1]
        return takes(clock, extra[length] * length**2)()

    monkeypatch.setattr(kernel_time, "matmul", takes(clock, 0.5))
    monkeypatch.setattr(kernel_time, "fast", lambda: Contestant(FAST, prepare))
    monkeypatch.setattr(
        kernel_time, "errors", lambda q, *_: {"log_det_error": 1e-7, "gradient_error": q.shape[-1] * 1e-7}
    )
    found = kernel_time.run_scaling(QUICK)
    relative = {length: row["relative"]["median"] for length, row in rows(found, "length").items()}
    assert relative == pytest.approx(extra)
    assert list(figures(found).values()) == pytest.approx([0.3, 1.28e-5])


def test_errors_along_a_sequence_are_those_of_the_fast_path_at_positions_up_to_the_last(monkeypatch):
    asked = []

    def truth(queries, keys, positions):
        asked.append(positions.tolist())
        # The fast path's own answer, but for one log-determinant and one entry of the gradient.
        values, (of_queries, of_keys) = kernel_time._fast_at(queries, keys, positions)
        wrong = np.asarray(values).copy()
        wrong[0, -1] += 0.5
        return wrong, (np.asarray(of_queries), 2 * np.asarray(of_keys))

    monkeypatch.setattr(kernel_time, "reference_at", truth)
    found = kernel_time.errors(*draw_cells(QUICK, 1, 12), 5)
    assert asked == [[1, 4, 6, 8, 11]]
    assert 0.2 < found["log_det_error"] <= 0.5
    assert 0 < found["gradient_error"] <= 0.5


@pytest.mark.parametrize(("on_device", "ratio"), [(lambda peak: None, 1.2), (lambda peak: 3 * peak**2, 1.44)])
def test_memory_ratios_are_those_of_the_device_where_there_is_one_and_absent_for_what_was_killed(
    monkeypatch, on_device, ratio
):
    peaks = {PLAIN: 1000, EXACT: 1200, SUBSAMPLED: 1100}

    def measured(work, sizes):
        if work == {"step": REFERENCE}:
            return {"missing": "its process ended with status 247: killed"}
        peak = peaks[work["step"]]
        return {"before": 500, "peak": peak, "device_peak": on_device(peak)}

    monkeypatch.setattr(peak_memory, "in_fresh_process", measured)
    found = peak_memory.run_step_memory(QUICK)
    assert figures(found) == {"peak memory of a step, exact barrier / plain": pytest.approx(ratio, rel=1e-15)}
    assert rows(found)[REFERENCE]["to_plain"] is None
    assert bool(found["notes"]) == (ratio > 1.4)


def test_kernel_memory_compares_the_two_longest(monkeypatch):
    def measured(work, sizes):
        return {"before": 1, "peak": 10 * work["kernel"], "planned": 7 + work["kernel"] ** 2}

    monkeypatch.setattr(peak_memory, "in_fresh_process", measured)
    found = peak_memory.run_kernel_memory(QUICK)
    assert [row["length"] for row in found["rows"]] == [16, 32, 64, 128]
    assert list(figures(found).values()) == pytest.approx([1280, (7 + 128**2) / (7 + 64**2)])
    # One array (n, n) is enough to be found out.
    assert is_met(found["targets"][1]) is False


def test_agreement_is_judged_at_the_scale_of_training(monkeypatch):
    def compared(contestant, queries, keys, truth):
        # Twice the weights, twice the queries: tell the scales apart by them.
        size = float(np.square(queries).mean())
        return {"log_det_error": size * 1e-6, "gradient_error": size * 2e-6}

    monkeypatch.setattr(agreement, "reference", lambda queries, keys: (np.array([-2.5, 1.0]), None))
    monkeypatch.setattr(agreement, "smallest_margin", lambda queries, keys: float(np.square(queries).mean()))
    monkeypatch.setattr(agreement, "with_log_det", lambda threads: [Contestant(FAST, None), Contestant("x", None)])
    monkeypatch.setattr(agreement, "compared", compared)
    found = agreement.run_agreement(QUICK)
    first, _, third, _ = found["rows"]
    assert third["log_det_error"] == pytest.approx(4 * first["log_det_error"])
    assert list(figures(found).values()) == [first["log_det_error"], first["gradient_error"]]
    assert [row["largest"] for row in found["rows"]] == [2.5] * 4
    assert third["margin"] == pytest.approx(4 * first["margin"])


def test_errors_are_relative_to_what_they_say():
    assert agreement.log_det_error([0.25, -8.0], np.array([0.5, -10.0])) == 0.25
    assert agreement.log_det_error([0.0, -8.0], np.array([0.5, -10.0])) == 0.5
    true = np.array([1.0, 0.0]), np.array([-4.0])
    assert agreement.gradient_error(([1.0, 1.0], [-4.0]), true) == 0.25
    assert agreement.gradient_error(([1.0, 0.0], [4.0]), true) == 2


def test_the_spread_of_estimates():
    found = training_step.summary([1.0, 1.0, 3.0, 3.0], [2.0, 0.0, 4.0, 4.0], [1.0, 1.0, 4.0, 10.0])
    assert found == {"mean": 2.0, "reported_deviation": 2.0, "error": 1.0, "mean_error": 0.5}


def test_estimates_are_compared_with_the_exact_mean_of_their_own_batch(monkeypatch):
    class Terms:
        penalty_variance = 0.25

        def __init__(self, penalty):
            self.penalty = penalty

    def prepare(sizes, config):
        shift = 0.0 if config.barrier_share == 1 else 0.5
        return lambda index: (None, Terms(index + shift))

    monkeypatch.setattr(training_step, "prepare", prepare)
    (row,) = training_step.run_subsampling(QUICK)["rows"]
    assert row["exact"] == [0.0, 1.0, 2.0, 3.0]
    assert (row["mean"], row["reported_deviation"], row["error"], row["mean_error"]) == (1.5, 0.5, 0.5, 0.5)


def test_every_step_begins_from_the_first_state_with_the_batch_of_its_number(monkeypatch):
    def train_step(data, state, config):
        characters, seed, step, _ = data
        assert 0 <= int(characters.min()) <= int(characters.max()) < QUICK.vocabulary
        return state, (int(seed), int(step), config)

    monkeypatch.setattr(training_step, "train_step", train_step)
    monkeypatch.setattr(training_step, "initial_state", lambda config, size: ("first", size))
    config = configurations(QUICK)[PLAIN]
    step = training_step.prepare(QUICK, config)
    for index in (0, 3):
        assert step(index) == (("first", QUICK.vocabulary), (QUICK.seed, index, config))


def test_the_product_of_matrices_has_the_asked_size_and_type():
    product = matmul(8, "bfloat16")()
    assert (product.shape, product.dtype) == ((8, 8), "bfloat16")
