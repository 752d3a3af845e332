"""One Kronecker product a matrix of parameters: of a site, the nearest to its block; of a network, two factors.

    P = D^1/2 (U (x) V) diag(l) (U (x) V)^T D^1/2       U (a, a) and V (b, b) orthogonal, l and D (a, b)

A site of shape (..., b) is seen as a matrix (a, b). D is the diagonal of the curvature of its prior, R what the rest of
its block is in units of D, and I + A (x) B = (U (x) V) diag(l) (U (x) V)^T with A (x) B nearest to R in Frobenius norm
over symmetric A and B: the best rank-one approximation of the entries of R rearranged as ((i, j), (p, q)) (Van Loan and
Pitsianis 1993). For an isotropic prior tau that is tau I + tau A (x) B, with the prior exact; for a vector A is a
number and the block is exact. Curvature between sites is left out.

Of a network: linear maps shared by positions ("KFAC-expand"), with the Gauss-Newton curvature.

A linear map h_s = W a_s is applied at every position s; the loss is a sum over positions t with Hessian H_t = S_t S_t^T
in the logits. With g_{s,tc} = (df_t/dh_s)^T S_t e_c, what column c of position t sends back to position s, the exact
Gauss-Newton block of W is sum_{t,c} (sum_s g_{s,tc} (x) a_s)(...)^T, and it is replaced by

    B (x) A,      B = sum over examples, t, c, s of g_{s,tc} g_{s,tc}^T,      A = mean over examples and s of a_s a_s^T

as Eschenhagen et al. (NeurIPS 2023) do; exact for one position and one example. Nothing is drawn over classes.

Each (t, c) by itself costs a backward pass per position and class. Rows E (R, n) combine the positions: what is sent
back is sum_t E_rt S_t e_c, and B is exact when E^T E = I.

    apart       E = I. Exact; n times V backward passes an example.
    signs       E one row of independent signs, drawn for each example. Exact in expectation; V backward passes.
    together    E a row of ones. Adds products of different positions, which the Gauss-Newton matrix has none of, and
                so is wrong wherever the map comes before a mixing of positions. It is what curvlinops, and so
                laplace-torch, computes, and is here to be compared with.

So D = 1 and l = b a + tau from the eigenvalues of B and A: the prior precision tau is added exactly, not spread over
the factors, and another tau needs no other factorisation.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from prob_transformer._validation import require_choice, require_count, require_finite
from prob_transformer.inference.laplace.curvature import (
    Curvature,
    Potential,
    block_of,
    curvature_diagonal,
    curvature_product,
)
from prob_transformer.inference.laplace.precision import BlockPrecision, Precision, require_definite

Positions = Literal["apart", "signs", "together"]
# Called with the name of a linear map, its inputs (n, i) and its outputs (n, o); returns what goes on.
Hook = Callable[[str, Float[Array, "n i"], Float[Array, "n o"]], Float[Array, "n o"]]
# From a hook, parameters and one example to logits.
Network = Callable[[Hook, PyTree, PyTree], Float[Array, "n V"]]


class KroneckerFactors(NamedTuple):
    """The curvature B (x) A of one matrix (o, i): B over outputs, A over inputs."""

    output: Float[Array, "o o"]
    input: Float[Array, "i i"]


Sums = dict[str, KroneckerFactors]


class KroneckerPrecision(Precision):
    """P of the module docstring for one matrix (a, b) of parameters, by rows."""

    scale: Float[Array, "a b"]
    left: Float[Array, "a a"]
    right: Float[Array, "b b"]
    values: Float[Array, "a b"]

    def __init__(self, scale: Array, left: Array, right: Array, values: Array):
        self.scale, self.left, self.right, self.values = scale, left, right, values
        self.size = values.size
        self.log_det = jnp.log(jnp.broadcast_to(scale, values.shape)).sum() + jnp.log(values).sum()

    def root(self, rows: Float[Array, "m k"]) -> Float[Array, "m k"]:
        matrices = rows.reshape(-1, *self.values.shape) / jnp.sqrt(self.values)
        return (self.left @ matrices @ self.right.T / jnp.sqrt(self.scale)).reshape(rows.shape)

    def variance(self) -> Float[Array, " k"]:
        return (self.left**2 @ (1 / self.values) @ (self.right**2).T / self.scale).ravel()

    def curvature_eigenvalues(self, prior: Float[Array, " k"]) -> Float[Array, " k"]:
        """Eigenvalues of P - diag(prior), for a prior that is the same everywhere, and D as well."""
        return (self.values * self.scale).ravel() - prior


def nearest_kronecker(block: Float[Array, "ab ab"], rows: int) -> tuple[Float[Array, "a a"], Float[Array, "b b"]]:
    """Symmetric A (a, a) and B (b, b), a = `rows`, with A (x) B nearest to a symmetric block in Frobenius norm."""
    columns = block.shape[0] // rows
    entries = block.reshape(rows, columns, rows, columns).transpose(0, 2, 1, 3)
    # Of the entries, the part that symmetric factors can reach.
    entries = 0.5 * (entries + entries.transpose(1, 0, 2, 3))
    left, values, right = jnp.linalg.svd(entries.reshape(rows**2, columns**2), full_matrices=False)
    root = jnp.sqrt(values[0])
    first, second = root * left[:, 0].reshape(rows, rows), root * right[0].reshape(columns, columns)
    return 0.5 * (first + first.T), 0.5 * (second + second.T)


def scaled_kronecker(
    diagonal: Float[Array, "a b"], left: Float[Array, "a a"], right: Float[Array, "b b"]
) -> KroneckerPrecision:
    """D^1/2 (I + A (x) B) D^1/2 from D and symmetric A, B. Raises IndefiniteCurvatureError unless it is definite."""
    left_values, left_vectors = jnp.linalg.eigh(left)
    right_values, right_vectors = jnp.linalg.eigh(right)
    values = require_definite(1 + left_values[:, None] * right_values, size=diagonal.size)
    scale = require_definite(diagonal, "smallest diagonal entry of the prior")
    return KroneckerPrecision(scale, left_vectors, right_vectors, values)


@eqx.filter_jit
def _site_blocks(potential: Potential, curvature: Curvature) -> dict[str, Float[Array, "b b"]]:
    """The block of every site, by its name."""
    product, z = curvature_product(potential, curvature), potential.centre()
    sites, start, found = potential.site_values(z), 0, {}
    for name in potential.sites:
        found[name] = block_of(product, z, start, start + sites[name].size)
        start += sites[name].size
    return found


def sites_precision(potential: Potential, curvature: Curvature) -> BlockPrecision:
    """A Kronecker product a site. Raises IndefiniteCurvatureError, naming the site, unless all are definite."""
    diagonal = require_definite(curvature_diagonal(potential, None), "smallest diagonal entry of the prior")
    prior = potential.site_values(diagonal)
    blocks: list[Precision] = []
    for name, block in _site_blocks(potential, curvature).items():
        # The nearest product of an indefinite block may be definite: the block itself is what is judged.
        require_definite(jnp.linalg.eigvalsh(block), f"smallest eigenvalue at site {name!r}", size=len(block))
        own = prior[name].reshape(-1, prior[name].shape[-1] if prior[name].ndim else 1)
        root = jnp.sqrt(own.ravel())
        rest = block / root / root[:, None] - jnp.eye(len(block), dtype=block.dtype)
        blocks.append(scaled_kronecker(own, *nearest_kronecker(rest, len(own))))
    return BlockPrecision(blocks)


def _decomposed(name: str, factor: Float[Array, "m m"]) -> tuple[Float[Array, " m"], Float[Array, "m m"]]:
    """Eigenvalues and eigenvectors of a sum of outer products, found in float64 and kept in its own type."""
    require_finite(name, factor)
    wide = np.asarray(factor, np.float64)
    values, vectors = np.linalg.eigh((wide + wide.T) / 2)
    # What is below 0 is rounding of a zero eigenvalue.
    return jnp.asarray(np.maximum(values, 0), factor.dtype), jnp.asarray(vectors, factor.dtype)


class KroneckerCurvature:
    """B (x) A for every linear map, in the order given. Raises ValueError for a factor that is not finite."""

    def __init__(self, factors: Mapping[str, KroneckerFactors]):
        self._blocks = []
        for name, pair in factors.items():
            outputs, left = _decomposed(f"output factor of {name!r}", pair.output)
            inputs, right = _decomposed(f"input factor of {name!r}", pair.input)
            self._blocks.append((left, right, outputs[:, None] * inputs))

    def precision(self, tau: float) -> BlockPrecision:
        """B (x) A + tau I, with tau > 0. Raises ValueError for no maps."""
        return BlockPrecision([KroneckerPrecision(jnp.ones((), c.dtype), u, v, c + tau) for u, v, c in self._blocks])

    def log_det_ratio(self, tau: float) -> float:
        """log det(B (x) A + tau I) - k log tau, in float64."""
        values = np.concatenate([np.ravel(c) for *_, c in self._blocks]).astype(np.float64)
        return float(np.log1p(values / tau).sum())


def softmax_root(logits: Float[Array, "n V"]) -> Float[Array, "n V V"]:
    """S = diag(sqrt p) - p sqrt(p)^T, for which S S^T = diag p - p p^T, the Hessian of the cross-entropy in nats."""
    p = jax.nn.softmax(logits)
    root = jnp.sqrt(p)
    return jax.vmap(jnp.diag)(root) - p[:, :, None] * root[:, None, :]


def combinations(positions: Positions, key: PRNGKeyArray, examples: int, length: int) -> Float[Array, "W R n"]:
    """The rows E of the module docstring for every example. Raises ValueError for an unknown name or an empty shape."""
    require_choice("positions", positions, get_args(Positions))
    require_count("examples", examples, 1, "the factors are sums over examples")
    require_count("length", length, 1, "the factors are sums over positions")
    if positions == "apart":
        return jnp.broadcast_to(jnp.eye(length, dtype=jnp.float32), (examples, length, length))
    if positions == "together":
        return jnp.ones((examples, 1, length), jnp.float32)
    return jax.random.rademacher(key, (examples, 1, length), jnp.float32)


def logits_and_inputs(
    network: Network, parameters: PyTree, example: PyTree, added: Mapping[str, Float[Array, "n o"]] = {}
) -> tuple[Float[Array, "n V"], dict[str, Float[Array, "n i"]]]:
    """The logits, with what is `added` to the outputs of linear maps, and the inputs of every map, by its name."""
    seen: dict[str, Array] = {}

    def hook(name: str, inputs: Array, outputs: Array) -> Array:
        seen[name] = inputs
        return outputs + added[name] if name in added else outputs

    return network(hook, parameters, example), seen


def _hooked(network: Network, parameters: PyTree, example: PyTree) -> dict[str, tuple[Any, Any]]:
    """Shapes and types of the inputs and outputs of every linear map, by its name."""
    found: dict[str, tuple[Any, Any]] = {}

    def hook(name: str, inputs: Array, outputs: Array) -> Array:
        if name in found:
            raise ValueError(f"network: calls its hook under {name!r} twice; give every linear map a name of its own.")
        if inputs.ndim != 2 or outputs.ndim != 2 or len(inputs) != len(outputs):
            raise ValueError(
                f"network: calls its hook under {name!r} with inputs {inputs.shape} and outputs {outputs.shape}; pass "
                "(n, i) and (n, o)."
            )
        found[name] = jax.eval_shape(lambda: (inputs, outputs))
        return outputs

    jax.eval_shape(lambda p, e: network(hook, p, e), parameters, example)
    if not found:
        raise ValueError(
            "network: calls its hook at no linear map; call hook(name, inputs, outputs) at those to be covered."
        )
    return found


@eqx.filter_jit
def kronecker_factors(
    network: Network,
    parameters: PyTree,
    examples: PyTree,
    rows: Float[Array, "W R n"],
    root: Callable[[Float[Array, "n V"]], Float[Array, "n V C"]] = softmax_root,
) -> dict[str, KroneckerFactors]:
    """B (outputs) and A (inputs) of every linear map at which `network` calls its hook, by its name.

    `network(hook, parameters, example)` calls hook(name, inputs, outputs) at every linear map, goes on with what that
    returns, and ends in logits; `examples` holds W of them in its leading axes, `rows` those of `combinations`. Pass
    the same function again and nothing is compiled again. Raises ValueError when the network calls its hook twice under
    a name, with inputs and outputs that are not (n, i) and (n, o), or never.
    """
    shapes = _hooked(network, parameters, jax.tree.map(lambda x: x[0], examples))
    zeros = {name: jnp.zeros(outputs.shape, outputs.dtype) for name, (_, outputs) in shapes.items()}

    def one_example(sums: Sums, item: tuple[PyTree, Float[Array, "R n"]]) -> tuple[Sums, None]:
        example, rows_here = item
        perturbed = partial(logits_and_inputs, network, parameters, example)
        logits, sent_back, seen = jax.vjp(perturbed, zeros, has_aux=True)
        columns = jnp.moveaxis(root(logits), -1, 0)

        def one_row(sums: Sums, row: Float[Array, " n"]) -> tuple[Sums, None]:
            (gradients,) = jax.vmap(sent_back)(row.astype(columns.dtype)[:, None] * columns)
            flat = {name: gradient.reshape(-1, gradient.shape[-1]) for name, gradient in gradients.items()}
            return {name: sums[name]._replace(output=sums[name].output + g.T @ g) for name, g in flat.items()}, None

        sums, _ = jax.lax.scan(one_row, sums, rows_here)
        return {name: sums[name]._replace(input=sums[name].input + a.T @ a) for name, a in seen.items()}, None

    start = {
        name: KroneckerFactors(*(jnp.zeros((each.shape[1],) * 2, outputs.dtype) for each in (outputs, inputs)))
        for name, (inputs, outputs) in shapes.items()
    }
    sums, _ = jax.lax.scan(one_example, start, (examples, rows))
    return {name: sums[name]._replace(input=sums[name].input / (len(rows) * len(zeros[name]))) for name in sums}
