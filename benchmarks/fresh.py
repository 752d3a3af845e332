"""`python -m benchmarks.fresh WORK SIZES`: do one piece of work and print its memory as JSON.

Started by peak_memory.py. WORK is {"step": NAME} or {"kernel": LENGTH}, SIZES the sizes, both JSON. `before` is the
peak once model and data are built, `peak` that after the work, in bytes, libraries and compilation included;
`device_peak` is that of a GPU, and `planned` what the compiler plans for arguments, results and all between them
(kernel only).
"""

import json
import resource
import sys
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.contestants import fast_mean
from benchmarks.sizes import Sizes, draw_cells
from benchmarks.training_step import configurations, prepare


def peak_of_this_process() -> int:
    """Bytes; the system's unit is a kilobyte, on macOS a byte."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _device_peak() -> int | None:
    statistics = jax.local_devices()[0].memory_stats()
    return None if statistics is None else statistics["peak_bytes_in_use"]


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


def main() -> None:
    work, sizes = json.loads(sys.argv[1]), Sizes(**json.loads(sys.argv[2]))
    found = _steps(sizes, work["step"]) if "step" in work else _kernel(sizes, work["kernel"])
    print(json.dumps({**found, "peak": peak_of_this_process(), "device_peak": _device_peak()}))


if __name__ == "__main__":
    main()
