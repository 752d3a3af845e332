"""The machine and the versions a result belongs to, and the rate at which the machine multiplies matrices."""

import os
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

_PACKAGES = ("jax", "jaxlib", "numpy", "equinox", "optax", "numpyro", "blackjax", "torch")


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def machine() -> dict[str, Any]:
    """Processor, cores, bytes of memory, system, and the device that JAX computes on."""
    device = jax.devices()[0]
    return {
        "processor": _processor(),
        "cores": cores(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "backend": jax.default_backend(),
        "device": device.device_kind,
    }


def versions() -> dict[str, str | None]:
    """Versions of Python and of what does the work; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def matmul(size: int, dtype: str = "float32") -> Callable[[], Any]:
    """A product of two size x size matrices by JAX, 2 size^3 operations, ready to be timed."""
    left, right = (jax.random.normal(key, (size, size), dtype) for key in jax.random.split(jax.random.key(0)))
    product = jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready(product(left, right))


def matmul_operations(size: int) -> float:
    return 2.0 * size**3
