"""Settings of the caller that must not matter: half precision, and whether JAX may promote ranks.

bfloat16 and float16 are cast at the door, because determinants need the digits.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PyTree

Tree = TypeVar("Tree")
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def _common_type(tree: PyTree) -> DTypeLike:
    arrays = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(getattr(leaf, "dtype", bool), jnp.floating)]
    return jnp.result_type(*arrays) if arrays else jnp.dtype(jnp.float32)


def _cast(tree: Tree, dtype: DTypeLike) -> Tree:
    leaves, structure = jax.tree.flatten(tree)
    for index, leaf in enumerate(leaves):
        if jnp.issubdtype(getattr(leaf, "dtype", bool), jnp.floating) and leaf.dtype != dtype:
            leaves[index] = jnp.asarray(leaf, dtype)
    return jax.tree.unflatten(structure, leaves)


def in_common_type(tree: Tree) -> Tree:
    """The tree with all its arrays of floating point in their common type, float32 at least."""
    return _cast(tree, jnp.promote_types(_common_type(tree), jnp.float32))


def in_float32_at_least(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """The function with all its arrays in their common type or float32; its result in half precision if all are."""

    @wraps(function)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        common = _common_type((args, kwargs))
        dtype = jnp.promote_types(common, jnp.float32)
        args, kwargs = _cast((args, kwargs), dtype)
        result = function(*args, **kwargs)
        return result if dtype == common else _cast(result, common)

    return wrapped


def ranks_promoted(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """The function where (b,) and (c, b) may meet in one operation, whatever jax_numpy_rank_promotion says outside."""

    @wraps(function)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return wrapped
