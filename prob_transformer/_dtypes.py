"""Settings of the caller that must not matter: half precision, and whether JAX may promote ranks.

bfloat16 and float16 are cast at the door, because determinants need the digits.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

Tree = TypeVar("Tree")
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def _floating(tree: PyTree) -> list[Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(getattr(leaf, "dtype", bool), jnp.floating)]


def _cast(tree: Tree, choose: Callable[[DTypeLike], DTypeLike]) -> Tree:
    def one(leaf: Any) -> Any:
        dtype = getattr(leaf, "dtype", bool)
        if not jnp.issubdtype(dtype, jnp.floating) or choose(dtype) == dtype:
            return leaf
        return jnp.asarray(leaf, choose(dtype))

    return jax.tree.map(one, tree)


def at_least_float32(tree: Tree) -> Tree:
    """The tree with its bfloat16 and float16 arrays in float32, the same numbers."""
    return _cast(tree, lambda dtype: jnp.promote_types(dtype, jnp.float32))


def in_common_type(tree: Tree) -> Tree:
    """The tree with all its arrays of floating point in their common type, float32 at least."""
    dtype = jnp.result_type(jnp.float32, *_floating(tree))
    return _cast(tree, lambda _: dtype)


def in_float32_at_least(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """The function with all its arrays in their common type or float32; its result in half precision if all are."""

    @wraps(function)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        arrays = _floating((args, kwargs))
        dtype = jnp.result_type(*arrays) if arrays else jnp.dtype(jnp.float32)
        args, kwargs = in_common_type((args, kwargs))
        result = function(*args, **kwargs)
        return result if dtype == jnp.promote_types(dtype, jnp.float32) else _cast(result, lambda _: dtype)

    return wrapped


def ranks_promoted(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """The function where (b,) and (c, b) may meet in one operation, whatever jax_numpy_rank_promotion says outside."""

    @wraps(function)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return wrapped
