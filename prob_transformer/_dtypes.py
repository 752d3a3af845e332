"""Settings of the caller that must not matter: half precision, and whether JAX may promote ranks.

bfloat16 and float16 are cast at the door, because determinants need the digits.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Tree = TypeVar("Tree")
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def cast(tree: Tree, dtype: DTypeLike | None = None) -> tuple[Tree, DTypeLike]:
    """The tree with its arrays of floating point in one type, and their common type, float32 where there are none.

    The type is the common one, float32 at least, unless given.
    """
    leaves, structure = jax.tree.flatten(tree)
    floating = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(getattr(leaf, "dtype", bool), jnp.floating)]
    common = jnp.result_type(*map(leaves.__getitem__, floating)) if floating else jnp.dtype(jnp.float32)
    dtype = jnp.promote_types(common, jnp.float32) if dtype is None else dtype
    for index in floating:
        if leaves[index].dtype != dtype:
            leaves[index] = jnp.asarray(leaves[index], dtype)
    return jax.tree.unflatten(structure, leaves), common


def in_common_type(tree: Tree) -> Tree:
    """The tree with all its arrays of floating point in their common type, float32 at least."""
    return cast(tree)[0]


def in_float32_at_least(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """The function with all its arrays in their common type or float32; its result in half precision if all are."""

    @wraps(function)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        (args, kwargs), common = cast((args, kwargs))
        result = function(*args, **kwargs)
        return cast(result, common)[0] if jnp.finfo(common).bits < 32 else result

    return wrapped


# Decorates a function in which (b,) and (c, b) may meet in one operation, whatever jax_numpy_rank_promotion is outside.
ranks_promoted = jax.numpy_rank_promotion("allow")
