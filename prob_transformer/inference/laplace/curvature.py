"""The curvature of the potential at the mode, as products with vectors; no matrix larger than asked for is formed.

    hessian    P = d^2 U / dz^2
    ggn        P = J^T (d^2 loss / df^2) J + d^2 rest / dz^2,      J = df/dz

The generalised Gauss-Newton curvature drops the second derivatives of f, the parameters that the data's distributions
are given: for logits, or a mean with a fixed scale, its likelihood part has no negative eigenvalue. It depends on which
parameters these are, and is indefinite where the loss is not convex in them (a mean and its scale together).
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from prob_transformer.inference.laplace.potential import Potential

Curvature = Literal["hessian", "ggn"]
Product = Callable[[Float[Array, " k"]], Float[Array, " k"]]

# Products evaluated side by side: enough for matrix-matrix speed, few enough for memory.
_SIDE_BY_SIDE = 64
# Units of the last digit within which two ways of computing an entry agree.
_ROUNDING = 8


def _hessian_product(value: Callable[[Float[Array, " k"]], Float[Array, ""]], z: Float[Array, " k"]) -> Product:
    return jax.linearize(jax.grad(value), z)[1]


def rest_product(potential: Potential) -> Product:
    """v -> (d^2 rest / dz^2) v: the curvature of the prior, factors and transforms alone."""
    return _hessian_product(potential.rest, potential.centre())


def curvature_product(potential: Potential, curvature: Curvature) -> Product:
    """v -> P v for the curvature named."""
    z = potential.centre()
    if curvature == "hessian":
        return _hessian_product(potential.value, z)
    parameters, loss = potential.outputs()
    outputs, forward = jax.linearize(parameters, z)
    backward = jax.linear_transpose(forward, z)
    outer = jax.linearize(jax.grad(loss), outputs)[1]
    rest = rest_product(potential)
    return lambda v: backward(outer(forward(v)))[0] + rest(v)


def block_of(product: Product, like: Float[Array, " k"], low: int, high: int) -> Float[Array, "b b"]:
    """Rows and columns low..high of the symmetric matrix behind a product; all of it from 0 to k."""

    def column(index: Int[Array, ""]) -> Float[Array, " b"]:
        return product(jnp.zeros_like(like).at[index].set(1.0))[low:high]

    return jax.lax.map(column, jnp.arange(low, high), batch_size=_SIDE_BY_SIDE)


def diagonal_of(product: Product, like: Float[Array, " k"]) -> Float[Array, " k"]:
    """The exact diagonal of the matrix behind a product, from k products, or from 2 if the matrix is diagonal."""
    row_sums = product(jnp.ones_like(like))
    # A matrix that is not diagonal passes only if A g = diag(A 1) g for a random g, which has probability 0.
    probe = jax.random.normal(jax.random.key(0), like.shape, like.dtype)
    error = jnp.abs(product(probe) - row_sums * probe)
    is_diagonal = (error <= _ROUNDING * jnp.finfo(like.dtype).eps * jnp.abs(row_sums * probe)).all()

    def entry(index: Int[Array, ""]) -> Float[Array, ""]:
        return product(jnp.zeros_like(like).at[index].set(1.0))[index]

    def one_by_one() -> Float[Array, " k"]:
        return jax.lax.map(entry, jnp.arange(like.shape[0]), batch_size=_SIDE_BY_SIDE)

    return jax.lax.cond(is_diagonal, lambda: row_sums, one_by_one)
