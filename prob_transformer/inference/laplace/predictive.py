"""Predictions under the Gaussian: by sampling, or by making the model's outputs linear in its parameters.

    sampling      z_s ~ N(z*, P^-1),  y_s ~ p(y | z_s),     log p(y_new | y) ~ log 1/S sum_s p(y_new | z_s)
    linearised    f(z) ~ f(z*) + J (z - z*),                f ~ N(f(z*), J P^-1 J^T)

f are the logits or the mean of one observed site. The linearised predictive goes with the Gauss-Newton curvature, which
is the Hessian of the linearised model; both agree where f is linear.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Num, PRNGKeyArray
from numpyro import handlers
from numpyro.infer import Predictive
from numpyro.primitives import Messenger

from prob_transformer.inference.joint import observed_data
from prob_transformer.inference.laplace.potential import Potential
from prob_transformer.inference.laplace.precision import Precision
from prob_transformer.inference.law import statistics

_WRAPPERS = (dist.Independent, dist.ExpandedDistribution, dist.MaskedDistribution)
# The parameter that is linearised, for each distribution of the data.
_OUTPUT: dict[type[dist.Distribution], str] = {
    dist.Normal: "loc",
    dist.CategoricalLogits: "logits",
    dist.BernoulliLogits: "logits",
}


class _Unobserved(Messenger):
    """The same model with its data drawn rather than given."""

    def process_message(self, msg: Any) -> None:
        if observed_data({"": msg}):
            msg["is_observed"], msg["value"] = False, None


class SampledPredictive(NamedTuple):
    """Draws of the sites that were approximated, `posterior`, and of the data, `posterior_predictive` (draws, ...).

    Where the call had data, `log_likelihood` (draws, ...) holds their log density under each draw and `log_density`
    (...) that under the mixture of all draws, in nats for each case.
    """

    posterior: dict[str, Float[Array, "draws ..."]]
    posterior_predictive: dict[str, Num[Array, "draws ..."]]
    log_likelihood: dict[str, Float[Array, "draws ..."]]
    log_density: dict[str, Float[Array, "..."]]


class LinearisedPredictive(NamedTuple):
    """A Gaussian over the outputs f of a site: `mean` (...) at the mode and `covariance` (m, m) of its m entries.

    `parameter` says what f is; `noise_scale` (...) is the site's own standard deviation for a normal site, else None.
    """

    site: str
    parameter: str
    distribution: str
    mean: Float[Array, "..."]
    covariance: Float[Array, "m m"]
    noise_scale: Float[Array, "..."] | None

    @property
    def variance(self) -> Float[Array, "..."]:
        """The variance of each output."""
        return jnp.diag(self.covariance).reshape(self.mean.shape)

    def predictive_covariance(self) -> Float[Array, "m m"]:
        """The covariance of new values of a normal site, with its noise at the mode; ValueError for other sites."""
        if self.noise_scale is None:
            raise ValueError(f"site: {self.site!r} is {self.distribution}, not Normal; use probit_probabilities().")
        return self.covariance + jnp.diag(jnp.square(self.noise_scale).ravel())

    def probit_probabilities(self) -> Float[Array, "..."]:
        """Probabilities with each logit divided by sqrt(1 + pi/8 variance), MacKay's approximation; ValueError for
        normal sites. Covariances between the logits of a case are left out."""
        if self.noise_scale is not None:
            raise ValueError(f"site: {self.site!r} is Normal and has no logits; use predictive_covariance().")
        scaled = self.mean / jnp.sqrt(1 + math.pi / 8 * self.variance)
        return jax.nn.sigmoid(scaled) if self.distribution == "BernoulliLogits" else jax.nn.softmax(scaled, axis=-1)


def _trace(potential: Potential, values: dict[str, Array], args: tuple, kwargs: dict) -> dict[str, dict[str, Any]]:
    # The seed is for data that the call leaves out; nothing here depends on what is drawn for them.
    model = handlers.seed(handlers.substitute(potential.model, data=values), jax.random.key(0))
    return handlers.trace(model).get_trace(*args, **kwargs)


def _data_names(potential: Potential, trace: dict[str, dict[str, Any]]) -> list[str]:
    """The sites of data, given or left out; a factor is a sample site of the distribution Unit."""
    samples = {name: site["fn"] for name, site in trace.items() if site["type"] == "sample"}
    return [name for name, fn in samples.items() if name not in potential.mode and not isinstance(fn, dist.Unit)]


def _draw(potential: Potential, precision: Precision, key: PRNGKeyArray, draws: int) -> dict[str, Array]:
    drawn = jax.vmap(potential.constrained)(potential.centre() + precision.sample(key, draws))
    return {name: drawn[name] for name in potential.mode}


@eqx.filter_jit
def draw(potential: Potential, precision: Precision, key: PRNGKeyArray, draws: int) -> dict[str, Array]:
    """Draws of the chosen sites in their supports, each (draws, ...)."""
    drawn = _draw(potential, precision, key, draws)
    return {name: drawn[name] for name in potential.sites}


@eqx.filter_jit
def log_joint(potential: Potential, precision: Precision, key: PRNGKeyArray, draws: int) -> Float[Array, " draws"]:
    """-U in nats at the same draws as `draw` has for this key."""
    return -jax.vmap(potential.value)(potential.centre() + precision.sample(key, draws))


@eqx.filter_jit
def law_statistics(potential: Potential, precision: Precision, key: PRNGKeyArray, draws: int) -> dict[str, Array]:
    """The `statistics` of the law at the same draws as `draw` has for this key."""
    return jax.vmap(lambda z: statistics(potential.trace(z)))(potential.centre() + precision.sample(key, draws))


@eqx.filter_jit
def sampled(
    potential: Potential, precision: Precision, key: PRNGKeyArray, draws: int, args: tuple, kwargs: dict
) -> SampledPredictive:
    """Predictions of the model called with `args` and `kwargs` under draws of the same parameters as `draw` has."""
    latent = _draw(potential, precision, key, draws)
    data_key = jax.random.fold_in(key, 1)
    names = _data_names(
        potential, _trace(potential, {name: values[0] for name, values in latent.items()}, args, kwargs)
    )
    predict = Predictive(_Unobserved(potential.model), latent, return_sites=names, parallel=True)
    drawn = predict(data_key, *args, **kwargs)

    def log_likelihood(values: dict[str, Array]) -> dict[str, Array]:
        trace = _trace(potential, values, args, kwargs)
        return {name: trace[name]["fn"].log_prob(value) for name, value in observed_data(trace).items()}

    densities = jax.vmap(log_likelihood)(latent)
    return SampledPredictive(
        posterior={name: latent[name] for name in potential.sites},
        posterior_predictive=drawn,
        log_likelihood=densities,
        log_density={name: logsumexp(values, axis=0) - math.log(draws) for name, values in densities.items()},
    )


def _site_at(
    potential: Potential, site: str, args: tuple, kwargs: dict
) -> Callable[[Float[Array, " k"]], dist.Distribution]:
    """The distribution of a site as a function of z; the model may be called without its data."""

    def distribution(z: Float[Array, " k"]) -> dist.Distribution:
        latent = {name: value for name, value in potential.constrained(z).items() if name in potential.mode}
        trace = _trace(potential, latent, args, kwargs)
        names = _data_names(potential, trace)
        if site not in names:
            raise ValueError(f"site: got {site!r}; pass one of the model's sites of data, {', '.join(names)}.")
        return trace[site]["fn"]

    return distribution


@eqx.filter_jit
def linearised(
    potential: Potential, precision: Precision, site: str, args: tuple, kwargs: dict
) -> LinearisedPredictive:
    """The outputs of `site` for the model called with `args` and `kwargs`, linear in the parameters around the mode."""
    distribution, z = _site_at(potential, site, args, kwargs), potential.centre()

    def base(fn: dist.Distribution) -> dist.Distribution:
        while isinstance(fn, _WRAPPERS):
            fn = fn.base_dist
        return fn

    whole = distribution(z)
    kind = type(base(whole))
    if kind not in _OUTPUT:
        names = ", ".join(known.__name__ for known in _OUTPUT)
        raise ValueError(f"site: {site!r} is {kind.__name__}, not one of {names}; use predictive() by sampling.")
    own = base(whole).logits.shape[-1:] if kind is dist.CategoricalLogits else ()

    def output(z: Float[Array, " k"]) -> Float[Array, "..."]:
        return jnp.broadcast_to(getattr(base(distribution(z)), _OUTPUT[kind]), (*whole.shape(), *own))

    mean = output(z)
    jacobian = (jax.jacrev if mean.size < z.size else jax.jacfwd)(output)(z).reshape(mean.size, z.size)
    noise = jnp.broadcast_to(base(whole).scale, whole.shape()) if kind is dist.Normal else None
    return LinearisedPredictive(site, _OUTPUT[kind], kind.__name__, mean, precision.covariance_of(jacobian), noise)
