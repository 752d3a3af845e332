"""Who is measured on the kernel: the mean barrier of given cells, with its gradient, by different means.

Every contestant takes the same queries and keys (c, p, n) of heads with identity values. The library's reference takes
them too, as embeddings (q_s, k_s) with projections that select one half each.
"""

import importlib.util
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from benchmarks import straightforward
from prob_transformer import Attention
from prob_transformer.kernels import blocked
from prob_transformer.kernels.barrier import mean_barrier, subsampled_barrier
from prob_transformer.kernels.projections import Projections
from prob_transformer.kernels.tiling import DEFAULT_TILING, Tiling

FAST, BFLOAT16, SUBSAMPLED = "fast exact", "fast exact, bfloat16 products", "fast subsampled"
CLOSED_FORM, AUTODIFF, TORCH = "straightforward closed form, JAX", "autodiff Jacobian, JAX", "straightforward, PyTorch"
NARROW = DEFAULT_TILING._replace(product_dtype="bfloat16")

Gradient = tuple[Any, tuple[Any, Any]]
Run = Callable[[], Gradient]


class Contestant(NamedTuple):
    """`prepare(q, k)` gives a call of value and gradient, ready to be timed; `log_det` the values behind the mean.

    `missing` says why a contestant cannot run here.
    """

    name: str
    prepare: Callable[[Any, Any], Run] | None
    log_det: Callable[[Any, Any], Any] | None = None
    missing: str | None = None


def cells_of(queries: Float[Array, "c p n"], keys: Float[Array, "c p n"]) -> Projections:
    """Every head alone, with identity values: what is seen through the queries are the queries."""
    scaled = queries[:, None] / math.sqrt(queries.shape[1])
    return Projections(scaled, jnp.concatenate([scaled, keys[:, None]], -2))


def side_by_side(
    queries: Float[Array, "c p n"], keys: Float[Array, "c p n"]
) -> tuple[Attention, Float[Array, "c n 2p"]]:
    """The same cells as one attention over embeddings u_s = (q_s, k_s)."""
    queries, keys = jnp.asarray(queries), jnp.asarray(keys)
    size = queries.shape[1]
    select = jnp.eye(2 * size, dtype=queries.dtype)
    attention = Attention(select[None, :size], select[None, size:])
    return attention, jnp.swapaxes(jnp.concatenate([queries, keys], 1), 1, 2)


def _by_jax(name: str, mean: Callable, log_det: Callable | None = None) -> Contestant:
    function = jax.jit(jax.value_and_grad(mean, (0, 1)))

    def prepare(queries: Any, keys: Any) -> Run:
        arrays = jnp.asarray(queries), jnp.asarray(keys)
        return lambda: jax.block_until_ready(function(*arrays))

    return Contestant(name, prepare, log_det and jax.jit(log_det))


def _by_log_det(name: str, log_det: Callable) -> Contestant:
    return _by_jax(name, lambda queries, keys: -log_det(queries, keys).mean(), log_det)


def fast_mean(
    queries: Float[Array, "c p n"], keys: Float[Array, "c p n"], tiling: Tiling = DEFAULT_TILING
) -> Float[Array, ""]:
    """The mean barrier by the kernels."""
    return mean_barrier(cells_of(queries, keys), tiling).mean


def fast(tiling: Tiling = DEFAULT_TILING, name: str = FAST) -> Contestant:
    """The kernels."""

    def log_det(queries: Float[Array, "c p n"], keys: Float[Array, "c p n"]) -> Float[Array, "c n"]:
        return blocked.residual_and_log_det(*side_by_side(queries, keys), tiling).log_det

    return _by_jax(name, partial(fast_mean, tiling=tiling), log_det)


def subsampled(share: float, seed: int) -> Contestant:
    """The kernels on a share of the cells."""
    key = jax.random.key(seed)
    return _by_jax(SUBSAMPLED, lambda q, k: subsampled_barrier(key, cells_of(q, k), share).mean)


def closed_form() -> Contestant:
    return _by_log_det(CLOSED_FORM, straightforward.log_det)


def autodiff() -> Contestant:
    return _by_log_det(AUTODIFF, straightforward.autodiff_log_det)


def torch_missing() -> str | None:
    """Why PyTorch cannot be measured here, or None."""
    if importlib.util.find_spec("torch") is None:
        return "PyTorch not installed"
    import torch

    if jax.default_backend() != "cpu" and not torch.cuda.is_available():
        return "this PyTorch has no GPU"
    return None


def by_torch(threads: int) -> Contestant:
    """PyTorch on as many threads, or on the GPU where JAX is on one; `missing` where it cannot run."""
    reason = torch_missing()
    if reason is not None:
        return Contestant(TORCH, None, missing=reason)
    import torch

    from benchmarks import straightforward_torch

    torch.set_num_threads(threads)
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    if device == "cuda":
        # JAX's own default there.
        torch.set_float32_matmul_precision("high")

    def prepare(queries: Any, keys: Any) -> Run:
        arrays = [torch.tensor(np.asarray(x), device=device, requires_grad=True) for x in (queries, keys)]

        def run() -> Gradient:
            result = straightforward_torch.value_and_gradient(*arrays)
            if device == "cuda":
                torch.cuda.synchronize()
            return result

        return run

    def log_det(queries: Any, keys: Any) -> np.ndarray:
        arrays = [torch.tensor(np.asarray(x), device=device) for x in (queries, keys)]
        return straightforward_torch.log_det(*arrays).cpu().numpy()

    return Contestant(TORCH, prepare, log_det)


def with_log_det(threads: int) -> list[Contestant]:
    """Those that give every position, for the agreement."""
    return [fast(), fast(NARROW, BFLOAT16), closed_form(), autodiff(), by_torch(threads)]


def to_numpy(found: Gradient) -> tuple[float, tuple[np.ndarray, np.ndarray]]:
    """Value and gradient from any library's arrays."""
    value, gradient = found
    queries, keys = (np.asarray(x.cpu() if hasattr(x, "cpu") else x) for x in gradient)
    return float(value), (queries, keys)
