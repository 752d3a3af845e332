"""Sections "step-memory" and "kernel-memory": the peak memory of a fresh process that does one piece of work.

The process is `python -m benchmarks.peak_memory WORK SIZES`, which prints its memory as JSON. WORK is {"step": NAME} or
{"kernel": LENGTH}, SIZES the sizes, both JSON. `before` is the peak once model and data are built, `peak` that after
the work, in bytes, libraries and compilation included; `device_peak` is that of a GPU, and `planned` what the compiler
plans for arguments, results and all between them (kernel only).
"""

import json
import resource
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from benchmarks.contestants import fast_mean
from benchmarks.problem_sizes import Sizes, draw_cells
from benchmarks.result_file import ROOT, device_peak
from benchmarks.result_tables import Column, Section, at_most
from benchmarks.training_step import EXACT, PLAIN, REFERENCE, SUBSAMPLED, configurations, describe, prepare

FOUR_GIGABYTES = 4e9
# When the length doubles, linear growth at most doubles the bytes; an array (n, n) makes them nearly fourfold.
MOST_GROWTH = 2.1
# Those whose memory is of interest; narrower products change little.
STEPS = (PLAIN, EXACT, SUBSAMPLED, REFERENCE)
# On Linux a process begins with the peak of the one that started it; this one, in between, is small.
_STARTER = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"


def in_fresh_process(work: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """What such a process prints for this work, or why there is nothing: {"missing": ...}."""
    command = [sys.executable, "-m", "benchmarks.peak_memory", json.dumps(work), json.dumps(sizes._asdict())]
    starter = [sys.executable, "-S", "-c", _STARTER, *command]
    finished = subprocess.run(starter, capture_output=True, text=True, check=False, cwd=ROOT)
    if finished.returncode != 0:
        last = (finished.stderr.strip().splitlines() or ["killed, perhaps for its memory"])[-1]
        return {"missing": f"its process ended with status {finished.returncode}: {last}"}
    return json.loads(finished.stdout.splitlines()[-1])


def _ratio(over: dict[str, Any], under: dict[str, Any], key: str = "peak") -> float | None:
    if "missing" in over or "missing" in under:
        return None
    return over[key] / under[key]


def run_step_memory(sizes: Sizes) -> dict[str, Any]:
    """Peaks of a few training steps, each kind in a process of its own."""
    rows: dict[str, dict[str, Any]] = {}
    for name in tqdm(STEPS, desc="step-memory", unit="process", leave=False):
        rows[name] = {"name": name, **in_fresh_process({"step": name}, sizes)}
    for row in rows.values():
        row["to_plain"] = _ratio(row, rows[PLAIN])
    on_device = rows[PLAIN].get("device_peak") is not None
    ratio = _ratio(rows[EXACT], rows[PLAIN], "device_peak" if on_device else "peak")
    return {
        "setting": f"{describe(sizes)}; {sizes.memory_steps} steps",
        "rows": list(rows.values()),
        "targets": [at_most("peak memory of a step, exact barrier / plain", ratio, 1.3)],
        "notes": ["The target is judged by the memory of the device."] if on_device else [],
    }


def run_kernel_memory(sizes: Sizes) -> dict[str, Any]:
    """Peaks of one kernel call against the length, each in a process of its own."""
    lengths = tqdm(sizes.lengths, desc="kernel-memory", unit="process", leave=False)
    rows = [{"length": length, **in_fresh_process({"kernel": length}, sizes)} for length in lengths]
    longest, before = sizes.lengths[-1], sizes.lengths[-2]
    return {
        "setting": f"{sizes.heads} cells (one sequence, {sizes.heads} heads), p = {sizes.head_size}, float32; value "
        "and gradient of the mean barrier",
        "rows": rows,
        "targets": [
            at_most(f"peak memory of the kernel at n = {longest}, bytes", rows[-1].get("peak"), FOUR_GIGABYTES),
            at_most(
                f"bytes planned for the kernel at n = {longest} / at n = {before}",
                _ratio(rows[-1], rows[-2], "planned"),
                MOST_GROWTH,
            ),
        ],
        "notes": [],
    }


_ABOUT = (
    "`ru_maxrss` of a fresh process, with the interpreter, the libraries and compilation in it and nothing taken off. "
)
_MEMORY = (
    Column("before", "before the first call, MB", "megabytes"),
    Column("peak", "peak, MB", "megabytes"),
    Column("device_peak", "peak on the device, MB", "megabytes"),
)
STEP_SECTION = Section(
    "step-memory",
    "Peak memory of a training step",
    f"{_ABOUT}Model and data are built before the first column.",
    (Column("name", "", "text"), *_MEMORY, Column("to_plain", "peak / plain", "number")),
    run_step_memory,
)
KERNEL_SECTION = Section(
    "kernel-memory",
    "Peak memory against the length",
    f"{_ABOUT}The last column is what the compiler plans for arguments, results and all arrays in between: with every "
    "doubling of n it at most doubles where memory is linear, and nearly becomes fourfold where any array is (n, n).",
    (Column("length", "n", "count"), *_MEMORY, Column("planned", "arrays, MB", "megabytes")),
    run_kernel_memory,
)


def peak_of_this_process() -> int:
    """Bytes; the system's unit is a kilobyte, on macOS a byte."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _steps(sizes: Sizes, name: str) -> dict[str, Any]:
    step = prepare(sizes, configurations(sizes)[name])
    before = peak_of_this_process()
    for index in range(sizes.memory_steps):
        step(index)
    return {"before": before}


def _kernel(sizes: Sizes, length: int) -> dict[str, Any]:
    cells = jax.block_until_ready([jnp.asarray(x) for x in draw_cells(sizes, 1, length)])
    before = peak_of_this_process()
    compiled = jax.jit(jax.value_and_grad(fast_mean, (0, 1))).lower(*cells).compile()
    jax.block_until_ready(compiled(*cells))
    plan: Any = compiled.memory_analysis()
    planned = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    return {"before": before, "planned": planned}


if __name__ == "__main__":
    work, of_sizes = json.loads(sys.argv[1]), Sizes(**json.loads(sys.argv[2]))
    found = _steps(of_sizes, work["step"]) if "step" in work else _kernel(of_sizes, work["kernel"])
    print(json.dumps({**found, "peak": peak_of_this_process(), "device_peak": device_peak()}))
