"""The potential around a mode as a function U(z) of the flat vector of the approximated sites, and its curvature P.

    U(z) = loss(f(z)) + rest(z)

    hessian    P = d^2 U / dz^2
    ggn        P = J^T (d^2 loss / df^2) J + d^2 rest / dz^2,      J = df/dz

f(z) are the parameters of the distributions of the data (logits, a mean), loss the negative log-likelihood as a
function of them, and rest the negative log density of the latent sites and factors less log|d theta / d z|. Sites that
are not chosen are held at the mode. The parameters in z are ordered by the names of their sites, each site row by row.

The generalised Gauss-Newton curvature drops the second derivatives of f: for logits, or a mean with a fixed scale, its
likelihood part has no negative eigenvalue. It depends on which parameters these are, and is indefinite where the loss
is not convex in them (a mean and its scale together). P is given as products with vectors; no matrix larger than asked
for is formed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.scipy.sparse.linalg import cg
from jaxtyping import Array, Float, Int, Num
from numpyro import handlers
from numpyro.primitives import Messenger

from prob_transformer.inference.embedding_sites import embedding_process
from prob_transformer.inference.joint import joint_and_trace, observed_data
from prob_transformer.inference.laplace.precision import Precision

Parameters = list[Float[Array, "..."]]
Trace = dict[str, dict[str, Any]]
Curvature = Literal["hessian", "ggn"]
Product = Callable[[Float[Array, " k"]], Float[Array, " k"]]

# Products evaluated side by side: enough for matrix-matrix speed, few enough for memory.
_SIDE_BY_SIDE = 64
# Units of the last digit within which two ways of computing an entry agree.
_ROUNDING = 8


class _Model(Messenger):
    """The same model, refused where JAX cannot make a linear map of its gradient; without its likelihood if asked:
    data then keep their values and get the log-density 0."""

    def __init__(self, model: Callable, *, likelihood: bool = True):
        super().__init__(model)
        self.likelihood = likelihood

    def process_message(self, msg: Any) -> None:
        process = embedding_process(msg)
        if process is not None and process.implementation == "blocked":
            raise ValueError(
                f"model: site {msg['name']!r} has implementation='blocked', whose gradient cannot be linearised; pass "
                "implementation='reference', which has the same density: to find_map, or to the model of its result "
                "by mode._replace(model_kwargs=...)."
            )
        if not self.likelihood and observed_data({"": msg}):
            msg["fn"] = msg["fn"].mask(False)


class Potential(eqx.Module):
    """A NumPyro model with its arguments, and the unconstrained mode: `mean` of the sites that vary, others `held`."""

    model: Callable
    args: tuple
    kwargs: dict[str, Any]
    mean: dict[str, Float[Array, "..."]]
    held: dict[str, Float[Array, "..."]]

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that vary, in the order of the parameters."""
        return tuple(sorted(self.mean))

    def centre(self) -> Float[Array, " k"]:
        """The mean as a flat vector."""
        return ravel_pytree(self.mean)[0]

    def site_values(self, z: Float[Array, " k"]) -> dict[str, Float[Array, "..."]]:
        """Unconstrained values of the sites that vary."""
        return ravel_pytree(self.mean)[1](z)

    def value(self, z: Float[Array, " k"], *, likelihood: bool = True) -> Float[Array, ""]:
        """U(z) in nats, or rest(z) without the likelihood."""
        model, point = _Model(self.model, likelihood=likelihood), {**self.held, **self.site_values(z)}
        return joint_and_trace(model, self.args, self.kwargs, "unconstrained", point)[0]

    def trace(self, z: Float[Array, " k"], arguments: tuple[tuple, dict[str, Any]] | None = None) -> Trace:
        """NumPyro's trace of the model at z, also when called with other arguments, which may leave out the data."""
        args, kwargs = arguments or (self.args, self.kwargs)
        # The seed is for these; nothing here depends on what is drawn for them.
        model = handlers.seed(self.model, jax.random.key(0))
        return joint_and_trace(model, args, kwargs, "unconstrained", {**self.held, **self.site_values(z)})[1]

    def outputs(self) -> tuple[Callable[[Float[Array, " k"]], Parameters], Callable[[Parameters], Float[Array, ""]]]:
        """f and loss, so that U = loss(f(z)) + rest(z)."""

        def data(z: Float[Array, " k"]) -> list[tuple[Any, Num[Array, "..."], Any]]:
            """Distribution, value and plates' scale of every observed site."""
            trace = self.trace(z)
            return [(trace[name]["fn"], value, trace[name]["scale"]) for name, value in observed_data(trace).items()]

        # By leaves: NumPyro's masked distributions do not survive a tree of booleans in their place.
        fixed, structure = jax.tree.flatten(data(self.centre()))
        floating = [index for index, leaf in enumerate(fixed) if eqx.is_inexact_array(leaf)]

        def parameters(z: Float[Array, " k"]) -> Parameters:
            leaves = jax.tree.leaves(data(z))
            return [leaves[index] for index in floating]

        def loss(outputs: Parameters) -> Float[Array, ""]:
            leaves = list(fixed)
            for index, output in zip(floating, outputs, strict=True):
                leaves[index] = output
            sites = jax.tree.unflatten(structure, leaves)
            terms = [jnp.sum(fn.log_prob(value)) * (1.0 if scale is None else scale) for fn, value, scale in sites]
            return -jnp.asarray(sum(terms, start=0.0))

        return parameters, loss


def curvature_product(potential: Potential, curvature: Curvature | None) -> Product:
    """v -> P v for the curvature named; for None d^2 rest / dz^2, that of the prior, factors and transforms alone."""
    z = potential.centre()
    value = partial(potential.value, likelihood=curvature == "hessian")
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
