"""Kronecker factors of the Gauss-Newton matrix of a network of linear maps shared by positions ("KFAC-expand").

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
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from prob_transformer._validation import require_count
from prob_transformer.inference.laplace.kronecker import KroneckerFactors

Positions = Literal["apart", "signs", "together"]
# Called with the name of a linear map, its inputs (n, i) and its outputs (n, o); returns what goes on.
Hook = Callable[[str, Float[Array, "n i"], Float[Array, "n o"]], Float[Array, "n o"]]
# From a hook, parameters and one example to logits.
Network = Callable[[Hook, PyTree, PyTree], Float[Array, "n V"]]
Sums = dict[str, KroneckerFactors]


def softmax_root(logits: Float[Array, "n V"]) -> Float[Array, "n V V"]:
    """S = diag(sqrt p) - p sqrt(p)^T, for which S S^T = diag p - p p^T, the Hessian of the cross-entropy in nats."""
    p = jax.nn.softmax(logits)
    root = jnp.sqrt(p)
    return jax.vmap(jnp.diag)(root) - p[:, :, None] * root[:, None, :]


def gaussian_root(logits: Float[Array, "n V"]) -> Float[Array, "n V V"]:
    """S = I, of the loss |y - f|^2 / 2."""
    return jnp.broadcast_to(jnp.eye(logits.shape[1], dtype=logits.dtype), (*logits.shape, logits.shape[1]))


def combinations(positions: Positions, key: PRNGKeyArray, examples: int, length: int) -> Float[Array, "W R n"]:
    """The rows E of the module docstring for every example. Raises ValueError for an unknown name or an empty shape."""
    if positions not in get_args(Positions):
        raise ValueError(f"positions: got {positions!r}; pass one of {', '.join(get_args(Positions))}.")
    require_count("examples", examples, 1, "the factors are sums over examples")
    require_count("length", length, 1, "the factors are sums over positions")
    if positions == "apart":
        return jnp.broadcast_to(jnp.eye(length, dtype=jnp.float32), (examples, length, length))
    if positions == "together":
        return jnp.ones((examples, 1, length), jnp.float32)
    return jax.random.rademacher(key, (examples, 1, length), jnp.float32)


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

        def perturbed(perturbations: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
            seen: dict[str, Array] = {}

            def hook(name: str, inputs: Array, outputs: Array) -> Array:
                seen[name] = inputs
                return outputs + perturbations[name]

            return network(hook, parameters, example), seen

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
