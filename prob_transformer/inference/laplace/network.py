"""A trained network as the mode of its weights: Kronecker and last-layer structures, evidence and predictions.

The k weights theta of its linear maps have the prior N(0, I / tau), all else of the network is taken as known, and the
trained weights theta* as the mode:

    log p(D) = log p(D | theta*) - (log det(H + tau I) - k log tau + tau |theta*|^2) / 2        nats

H is the Gauss-Newton matrix of the cross-entropy. Weights of a stopped training are not quite the mode, nor was their
training with this tau: the evidence compares tau, it is not a bound.

    last-layer    the head alone, with the whole of H                           (last_layer.py)
    kronecker     every linear map, with Kronecker factors of its block of H    (kronecker.py)

Predictions take the logits as linear in the weights, f(theta) = f + J (theta - theta*):

    sampled       mean over draws of softmax(f + J (theta_s - theta*))
    probit        softmax(f_v / sqrt(1 + pi/8 var_v)),    var = diag(J P^-1 J^T)        (MacKay 1992; last layer)
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree
from scipy.special import softmax

from prob_transformer._validation import require_draws, require_positive
from prob_transformer.inference.laplace.kronecker import (
    KroneckerCurvature,
    Network,
    Positions,
    combinations,
    kronecker_factors,
    logits_and_inputs,
)
from prob_transformer.inference.laplace.last_layer import (
    CholeskyPrecision,
    gauss_newton,
    kronecker_of_layer,
    logit_variance,
)
from prob_transformer.inference.laplace.precision import Precision
from prob_transformer.inference.laplace.predictive import probit_logits
from prob_transformer.inference.laplace.tuning import coarse_prior_precision
from prob_transformer.inference.result_tree import DataTree, datatree

NetworkStructure = Literal["last-layer", "kronecker"]
Matrices = dict[str, Float[Array, "*S o i"]]
# Examples whose activations are kept side by side.
_SIDE_BY_SIDE = 64


class TrainedNetwork(NamedTuple):
    """A network with softmax outputs at trained weights, and the examples that its evidence is of.

    `logits(hook, parameters, example)` (n, V) calls hook(name, inputs, outputs) at every linear map, named as in
    `maps`; `replaced(parameters, maps)` are the parameters with some maps replaced. `targets` are the classes that the
    `examples` are followed by, position by position, and `head` the map whose outputs are the logits. Pass the same
    functions again and nothing is compiled again.
    """

    logits: Network
    replaced: Callable[[PyTree, Matrices], PyTree]
    parameters: PyTree
    maps: Matrices
    head: str
    examples: Int[Array, "W n"]
    targets: Int[Array, "W n"]


class Evidence(NamedTuple):
    """The parts of the log-evidence, in nats: log-likelihood, log det P - k log tau, and tau |theta*|^2."""

    log_likelihood: float
    log_det_ratio: float
    scatter: float

    @property
    def total(self) -> float:
        """The log-evidence in nats."""
        return self.log_likelihood - (self.log_det_ratio + self.scatter) / 2


class NetworkPredictive(NamedTuple):
    """Of S draws: the `posterior` of every map, the mean `probabilities`, and each draw's `log_likelihood` of the
    targets."""

    posterior: Matrices
    probabilities: Float[Array, "W n V"]
    log_likelihood: Float[Array, "S W n"]


@eqx.filter_jit
def _losses(network: TrainedNetwork) -> Float[Array, " W"]:
    def loss(pair: tuple[Int[Array, " n"], Int[Array, " n"]]) -> Float[Array, ""]:
        log_p = jax.nn.log_softmax(logits_and_inputs(network.logits, network.parameters, pair[0])[0])
        return -jnp.take_along_axis(log_p, pair[1][:, None], -1).sum()

    return jax.lax.map(loss, (network.examples, network.targets), batch_size=_SIDE_BY_SIDE)


@eqx.filter_jit
def head_inputs(
    network: TrainedNetwork, examples: Int[Array, "W n"]
) -> tuple[Float[Array, "N d"], Float[Array, "N V"]]:
    """What the head multiplies at every position of the examples, and the logits, N = W n."""

    def seen_by_head(example: Int[Array, " n"]) -> tuple[Array, Array]:
        logits, seen = logits_and_inputs(network.logits, network.parameters, example)
        return seen[network.head], logits

    inputs, logits = jax.lax.map(seen_by_head, examples, batch_size=_SIDE_BY_SIDE)
    return inputs.reshape(-1, inputs.shape[-1]), logits.reshape(-1, logits.shape[-1])


@eqx.filter_jit
def _linearised(
    network: TrainedNetwork, mean: Matrices, deviations: Matrices, examples: Array, targets: Array
) -> tuple[Float[Array, "W n V"], Float[Array, "W S n"]]:
    def one_example(pair: tuple[Int[Array, " n"], Int[Array, " n"]]) -> tuple[Array, Array]:
        example, target = pair

        def outputs(maps: Matrices) -> Float[Array, "n V"]:
            return logits_and_inputs(network.logits, network.replaced(network.parameters, maps), example)[0]

        logits, change = jax.linearize(outputs, mean)

        def one_draw(total: Array, deviation: Matrices) -> tuple[Array, Array]:
            log_p = jax.nn.log_softmax(logits + change(deviation))
            return total + jnp.exp(log_p), jnp.take_along_axis(log_p, target[:, None], -1)[:, 0]

        total, seen = jax.lax.scan(one_draw, jnp.zeros_like(logits), deviations)
        return total / len(seen), seen

    return jax.lax.map(one_example, (examples, targets))


class NetworkLaplace(NamedTuple):
    """A Gaussian over the weights of a network's linear maps around the trained ones, `mean`, of k parameters.

    `precision` orders the maps by name, each by rows; `evidence` is that of the examples at `prior_precision`.
    """

    network: TrainedNetwork
    structure: str
    mean: Matrices
    precision: Precision
    prior_precision: float
    evidence: Evidence

    @property
    def log_evidence(self) -> float:
        """In nats."""
        return self.evidence.total

    def logits(self, examples: Int[Array, "W n"]) -> Float[Array, "W n V"]:
        """Those of the trained weights."""
        return head_inputs(self.network, examples)[1].reshape(*examples.shape, -1)

    def predictive(
        self, key: PRNGKeyArray, draws: int, examples: Int[Array, "W n"], targets: Int[Array, "W n"]
    ) -> NetworkPredictive:
        """Predictions of examples by linearised logits, over draws of the weights."""
        require_draws(key, draws)
        flat, unravel = ravel_pytree(self.mean)
        deviations = jax.vmap(unravel)(jnp.asarray(self.precision.sample(key, draws), flat.dtype))
        probabilities, log_p = _linearised(self.network, self.mean, deviations, examples, targets)
        posterior = jax.tree.map(jnp.add, self.mean, deviations)
        return NetworkPredictive(posterior, probabilities, log_p.swapaxes(0, 1))

    def to_datatree(self, predicted: NetworkPredictive, targets: Int[Any, "W n"], attrs: Mapping[str, Any]) -> DataTree:
        """One chain of draws of the maps, with the log-likelihood of the targets; `attrs` as for `datatree`."""
        groups = {
            "posterior": {name: np.asarray(draws)[None] for name, draws in predicted.posterior.items()},
            "log_likelihood": {"tokens": np.asarray(predicted.log_likelihood)[None]},
            "observed_data": {"tokens": targets},
        }
        return datatree(groups, {name: (f"{name}_output", f"{name}_input") for name in self.mean}, attrs)

    def logit_variance(self, examples: Int[Array, "W n"]) -> Float[np.ndarray, "W n V"]:
        """The variance of every linearised logit, diag(J P^-1 J^T); dear for all maps, cheap for the last layer."""
        if isinstance(self.precision, CholeskyPrecision):
            return logit_variance(self.precision, head_inputs(self.network, examples)[0]).reshape(*examples.shape, -1)
        return np.stack([_position_variances(self.network, self.mean, self.precision, each) for each in examples])

    def probit_probabilities(self, examples: Int[Array, "W n"]) -> Float[np.ndarray, "W n V"]:
        """Probabilities of the `probit_logits`, in float64."""
        logits = np.asarray(self.logits(examples), np.float64)
        return softmax(probit_logits(logits, np.asarray(self.logit_variance(examples), np.float64)), axis=-1)


def logit_jacobian(
    network: TrainedNetwork, mean: Matrices, example: Int[Array, " n"], position: Int[Array, ""]
) -> Float[Array, "V k"]:
    """Derivative of the logits at one position of an example in the maps `mean`, flat."""

    def logits(maps: Matrices) -> Float[Array, " V"]:
        return logits_and_inputs(network.logits, network.replaced(network.parameters, maps), example)[0][position]

    found, sent_back = jax.vjp(logits, mean)
    return jax.vmap(lambda row: ravel_pytree(sent_back(row)[0])[0])(jnp.eye(found.shape[0], dtype=found.dtype))


@eqx.filter_jit
def _position_variances(
    network: TrainedNetwork, mean: Matrices, precision: Precision, example: Int[Array, " n"]
) -> Float[Array, "n V"]:
    def one(position: Int[Array, ""]) -> Float[Array, " V"]:
        return jnp.diag(precision.covariance_of(logit_jacobian(network, mean, example, position)))

    return jax.lax.map(one, jnp.arange(example.shape[0]))


Ratio = Callable[[float], float]


def _kronecker(
    network: TrainedNetwork, positions: Positions, key: PRNGKeyArray
) -> tuple[Callable[[float], Precision], Ratio, Ratio]:
    """P and log det P - k log tau as functions of tau, and the latter where only its shape matters."""
    rows = combinations(positions, key, *network.examples.shape)
    factors = kronecker_factors(network.logits, network.parameters, network.examples, rows)
    curvature = KroneckerCurvature({name: factors[name] for name in sorted(network.maps)})
    return curvature.precision, curvature.log_det_ratio, curvature.log_det_ratio


def _last_layer(network: TrainedNetwork) -> tuple[Callable[[float], Precision], Ratio, Ratio]:
    """As `_kronecker`; every tau costs a Cholesky factor of several hundred megabytes, of which the last is kept."""
    inputs, logits = head_inputs(network, network.examples)
    matrix = gauss_newton(inputs, logits)
    at = lru_cache(maxsize=1)(lambda tau: CholeskyPrecision(matrix, tau))
    rough = KroneckerCurvature({network.head: kronecker_of_layer(inputs, logits)})
    return at, lambda tau: at(tau).log_det - len(matrix) * float(np.log(tau)), rough.log_det_ratio


def network_laplace(
    network: TrainedNetwork,
    structure: str,
    positions: Positions,
    prior_precision: float | None,
    key: PRNGKeyArray,
) -> NetworkLaplace:
    """The Gaussian over the head, or over all maps; without a prior precision at that of the largest evidence."""
    if prior_precision is not None:
        require_positive("prior_precision", prior_precision)
    last_layer = structure == "last-layer"
    at, ratio, rough = _last_layer(network) if last_layer else _kronecker(network, positions, key)
    mean = {name: network.maps[name] for name in ([network.head] if last_layer else sorted(network.maps))}
    log_likelihood = -float(np.asarray(_losses(network), np.float64).sum())
    square = float(np.square(np.asarray(ravel_pytree(mean)[0], np.float64)).sum())

    def evidence(tau: float, log_det_ratio: Ratio = ratio) -> Evidence:
        return Evidence(log_likelihood, log_det_ratio(tau), tau * square)

    tau = prior_precision
    if tau is None:
        tau = coarse_prior_precision(lambda t: evidence(t, rough).total)
        if last_layer:
            tau = coarse_prior_precision(lambda t: evidence(t).total, tau)
    return NetworkLaplace(network, structure, mean, at(tau), tau, evidence(tau))
