"""The plan of the benchmark on an accelerator, on the CPU with tiny sizes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import accelerator

BARE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in "arviz blackjax h5netcdf hypothesis mwparserfromhell pandas rich xarray".split():
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
import benchmarks.accelerator
"""


def test_it_imports_on_a_machine_with_jax_numpyro_equinox_and_optax_alone():
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", BARE], cwd=root, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_the_plan_has_every_size_length_and_type_of_products():
    plan = [of_row for of_row, _ in accelerator.rows(accelerator.Sizes())]
    kernels = {(row["head_size"], row["length"], row["products"]) for row in plan if row["row"] == "kernel"}
    assert kernels == {
        (size, length, name)
        for size in (16, 32, 64, 128)
        for length in (256, 1024, 4096, 16384)
        for name in ("float32", "bfloat16")
    }
    assert [row["row"] for row in plan][:8] == 8 * ["agreement"]
    assert sum(row["row"] == "training-step" for row in plan) == 3


def test_rows_are_written_as_they_are_measured_and_the_time_is_kept(tmp_path, monkeypatch):
    measured = iter([{"value": 1.0}, {"value": 2.0}])

    def measure():
        try:
            return next(measured)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(accelerator, "rows", lambda sizes: [({"row": str(i)}, measure) for i in range(4)])
    with pytest.raises(KeyboardInterrupt):
        accelerator.run(tmp_path / "killed.json", 100.0, accelerator.TINY)
    kept = json.loads((tmp_path / "killed.json").read_text())
    assert [row["value"] for row in kept["rows"]] == [1, 2]
    assert {"device", "backend"} <= set(kept["machine"])
    late = accelerator.run(tmp_path / "late.json", 1e-9, accelerator.TINY)
    assert late["rows"] == []
    assert len(late["left_out"]) == 4


@pytest.mark.slow
def test_tiny_sizes_run_from_the_command_line(tmp_path):
    assert accelerator.main(["--tiny", "--out", str(tmp_path / "result.json")]) == 0
    found = json.loads((tmp_path / "result.json").read_text())
    rows = {row["row"]: row for row in found["rows"] if row["products"] == "float32"}
    assert set(rows) == {"agreement", "matmul", "training-step", "kernel"}
    assert rows["agreement"]["value"] < 1e-5
    assert rows["agreement"]["gradient"] < 1e-5
    assert found["left_out"] == []
    assert all(np.min(row["seconds"]) > 0 for row in found["rows"] if "seconds" in row)
