"""Checks at the public boundary; each raises a ValueError naming the argument, what was given and the remedy."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray


def require_floating(name: str, array: Any, *, finite: bool = False, positive: bool = False) -> jax.Array:
    """The argument as a floating JAX array; anything that is not numeric is refused by name, and what is not `finite`,
    or finite and `positive`, if asked for."""
    try:
        converted = jnp.asarray(array)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: got {type(array).__name__}; pass a numeric array.") from None
    except OverflowError:
        raise ValueError(f"{name}: got an integer too large for JAX; pass a floating number.") from None
    if not jnp.issubdtype(converted.dtype, jnp.floating):
        if not (jnp.issubdtype(converted.dtype, jnp.integer) or converted.dtype == bool):
            raise ValueError(f"{name}: has dtype {converted.dtype}; pass real numbers.")
        converted = converted.astype(jnp.result_type(float))
    # The argument itself, because inside a trace JAX makes a tracer, whose values are unknown, of known values as well;
    # in the dtype it gets, in which a large number may be inf and a small one 0.
    if finite and not isinstance(array, jax.core.Tracer):
        with np.errstate(over="ignore"):
            known = np.asarray(array).astype(converted.dtype, copy=False)
        if not np.isfinite(known).all():
            raise ValueError(f"{name}: contains NaN or inf in {known.dtype}; pass finite values only.")
        if positive and not (known > 0).all():
            raise ValueError(f"{name}: got {np.asarray(array).tolist()}; pass a value greater than 0 in {known.dtype}.")
    return converted


require_finite = partial(require_floating, finite=True)
require_positive = partial(require_floating, finite=True, positive=True)


def require_count(name: str, value: Any, smallest: int, why: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < smallest:
        raise ValueError(f"{name}: got {value!r}; pass an integer of at least {smallest}: {why}.")


def require_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}; pass one of {', '.join(allowed)}.")


def require_seed(name: str, value: Any, purpose: str) -> None:
    require_count(name, value, 0, f"the seed of {purpose}")
    if value >= 2**32:
        raise ValueError(f"{name}: got {value}; pass an integer below 2^32: only so much of it counts for {purpose}.")


def require_key(name: str, key: Any, shape: tuple[int, ...] = ()) -> PRNGKeyArray:
    """The argument, one JAX random key or keys of that shape; a key of the old kind, in uint32, has one more axis."""
    is_new = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    is_old = getattr(key, "dtype", None) == np.uint32 and key.ndim == len(shape) + 1
    if (not is_new and not is_old) or (key.shape if is_new else key.shape[:-1]) != shape:
        given = f"shape {key.shape} and dtype {key.dtype}" if hasattr(key, "dtype") else f"{key!r}"
        remedy = f"random keys of shape {shape}, one each" if shape else "one JAX random key, such as jax.random.key(0)"
        raise ValueError(f"{name}: got {given}; pass {remedy}.")
    return key


def require_draws(key: Any, draws: Any) -> None:
    require_key("key", key)
    require_count("draws", draws, 1, "the number of draws")


def require_integers(name: str, array: Any) -> jax.Array:
    """The argument as an integer JAX array, int32 where its values are known; these stay known inside a trace, and are
    refused where 32 bits do not hold them."""
    is_known = not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(array))
    try:
        given = array if isinstance(array, jax.Array) else (np if is_known else jnp).asarray(array)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"{name}: got a {type(array).__name__} that forms no array; pass integers.") from None
    if isinstance(array, (list, tuple)) and not given.size:
        # An empty list has no dtype of its own.
        given = given.astype(np.int32)
    if not jnp.issubdtype(given.dtype, jnp.integer):
        raise ValueError(f"{name}: has shape {given.shape} and dtype {given.dtype}; pass integers.")
    if is_known and (np.asarray(given) != np.asarray(given).astype(np.int32)).any():
        raise ValueError(f"{name}: contains integers that 32 bits do not hold; pass indices into the vocabulary.")
    with jax.ensure_compile_time_eval() if is_known else nullcontext():
        return jnp.asarray(given, jnp.int32 if is_known or given.dtype.itemsize < 4 else None)


def require_vocabulary(name: str, tokens: Int[Array, "..."], size: int) -> None:
    """Refuse known tokens that are no indices into a vocabulary of this size."""
    # NumPy, because inside a trace JAX would trace even this comparison of known values.
    if not isinstance(tokens, jax.core.Tracer) and not ((np.asarray(tokens) >= 0) & (np.asarray(tokens) < size)).all():
        raise ValueError(f"{name}: contains tokens outside 0..{size - 1}; pass indices into the vocabulary of {size}.")


def require_embeddings(name: str, embeddings: Any, width: int) -> jax.Array:
    """The embeddings as a floating array of shape (..., n, d) with n >= 2, d = width and finite values."""
    array = require_finite(name, embeddings)
    if array.ndim < 2 or array.shape[-1] != width:
        raise ValueError(
            f"{name}: has shape {array.shape}; pass (..., n, d) with d = {width}, the width of the attention."
        )
    if array.shape[-2] < 2:
        raise ValueError(
            f"{name}: has n = {array.shape[-2]} positions; pass at least 2: the first position has no past to "
            "attend to, so a shorter sequence has no attention."
        )
    return array
