"""Sections "step-memory" and "kernel-memory": the peak memory of a fresh process that does one piece of work."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.section import Column, Section, at_most
from benchmarks.sizes import Sizes
from benchmarks.training_step import EXACT, PLAIN, REFERENCE, SUBSAMPLED, describe

ROOT = Path(__file__).resolve().parent.parent
FOUR_GIGABYTES = 4e9
# When the length doubles, linear growth at most doubles the bytes; an array (n, n) makes them nearly fourfold.
MOST_GROWTH = 2.1
# Those whose memory is of interest; narrower products change little.
STEPS = (PLAIN, EXACT, SUBSAMPLED, REFERENCE)
# On Linux a process begins with the peak of the one that started it; this one, in between, is small.
_STARTER = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"


def in_fresh_process(work: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """What fresh.py prints for this work, or why there is nothing: {"missing": ...}."""
    command = [sys.executable, "-m", "benchmarks.fresh", json.dumps(work), json.dumps(sizes.as_dict())]
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
