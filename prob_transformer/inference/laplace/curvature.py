"""The curvature P of the potential at the mode, as products with vectors; no matrix larger than asked for is formed.

    hessian    P = d^2 U / dz^2
    ggn        P = J^T (d^2 loss / df^2) J + d^2 rest / dz^2,      J = df/dz

The generalised Gauss-Newton curvature drops the second derivatives of f, the parameters that the data's distributions
are given: for logits, or a mean with a fixed scale, its likelihood part has no negative eigenvalue. It depends on which
parameters these are, and is indefinite where the loss is not convex in them (a mean and its scale together).
"""

from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg
from jaxtyping import Array, Float, Int

from prob_transformer.inference.laplace.potential import Potential
from prob_transformer.inference.laplace.precision import Precision

Curvature = Literal["hessian", "ggn"]
Product = Callable[[Float[Array, " k"]], Float[Array, " k"]]

# Products evaluated side by side: enough for matrix-matrix speed, few enough for memory.
_SIDE_BY_SIDE = 64
# Units of the last digit within which two ways of computing an entry agree.
_ROUNDING = 8


def curvature_product(potential: Potential, curvature: Curvature | None) -> Product:
    """v -> P v for the curvature named; for None d^2 rest / dz^2, that of the prior, factors and transforms alone."""
    z = potential.centre()
    value = potential.value if curvature == "hessian" else potential.rest
    product = jax.linearize(jax.grad(value), z)[1]
    if curvature != "ggn":
        return product
    parameters, loss = potential.outputs()
    outputs, forward = jax.linearize(parameters, z)
    backward = jax.linear_transpose(forward, z)
    outer = jax.linearize(jax.grad(loss), outputs)[1]
    return lambda v: backward(outer(forward(v)))[0] + product(v)


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


@eqx.filter_jit
def curvature_matrix(potential: Potential, curvature: Curvature) -> Float[Array, "k k"]:
    """P in full."""
    z = potential.centre()
    return block_of(curvature_product(potential, curvature), z, 0, z.shape[0])


@eqx.filter_jit
def curvature_diagonal(potential: Potential, curvature: Curvature | None) -> Float[Array, " k"]:
    """The diagonal of P, or for None of the prior's part."""
    return diagonal_of(curvature_product(potential, curvature), potential.centre())


@eqx.filter_jit
def covariance_product(
    potential: Potential,
    preconditioner: Precision,
    curvature: Curvature,
    v: Float[Array, " k"],
    tolerance: Float[Array, ""],
    max_steps: Int[Array, ""],
) -> tuple[Float[Array, " k"], Float[Array, ""], Float[Array, ""]]:
    """P^-1 v by conjugate gradients, its relative residual |P x - v| / |v|, and v^T P^-1 v; P is never formed."""
    product = curvature_product(potential, curvature)
    x = cg(product, v, tol=0.1 * tolerance, maxiter=max_steps, M=preconditioner.solve)[0]
    return x, jnp.linalg.norm(product(x) - v) / jnp.linalg.norm(v), x @ v
