"""Predictions under the Gaussian: by sampling, or by making the model's outputs linear in its parameters.

    sampling      z_s ~ N(z*, P^-1),  y_s ~ p(y | z_s),     log p(y_new | y) ~ log 1/S sum_s p(y_new | z_s)
    linearised    f(z) ~ f(z*) + J (z - z*),                f ~ N(f(z*), J P^-1 J^T)

f are the logits or the mean of one observed site. The linearised predictive goes with the Gauss-Newton curvature, which
is the Hessian of the linearised model; both agree where f is linear.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Num, PRNGKeyArray
from numpyro.infer import Predictive
from numpyro.primitives import Messenger

from prob_transformer.inference.embedding_sites import unwrapped
from prob_transformer.inference.joint import log_likelihood, observed_data
from prob_transformer.inference.laplace.curvature import Potential, Trace
from prob_transformer.inference.laplace.precision import Precision
from prob_transformer.inference.law import statistics

# The parameter that is linearised, for each distribution of the data.
_OUTPUT: dict[type[dist.Distribution], str] = {
    dist.Normal: "loc",
    dist.CategoricalLogits: "logits",
    dist.BernoulliLogits: "logits",
}


class _Unobserved(Messenger):
    """The same model with its data drawn rather than given."""

    # NumPyro's `uncondition` takes the key of a `seed` inside the model, so that all draws would have the same noise.
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


def probit_logits(mean: Float[Any, "..."], variance: Float[Any, "..."]) -> Float[Any, "..."]:
    """Each logit divided by sqrt(1 + pi/8 variance): their probabilities are MacKay's (1992) approximation of the mean
    probabilities. Covariances between the logits of a case are left out."""
    return mean / (1 + math.pi / 8 * variance) ** 0.5


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
        """Probabilities of the `probit_logits`; ValueError for normal sites."""
        if self.noise_scale is not None:
            raise ValueError(f"site: {self.site!r} is Normal and has no logits; use predictive_covariance().")
        scaled = probit_logits(self.mean, self.variance)
        return jax.nn.sigmoid(scaled) if self.distribution == "BernoulliLogits" else jax.nn.softmax(scaled, axis=-1)


def _data_names(potential: Potential, trace: Trace) -> list[str]:
    """The sites of data, given or left out; a factor is a sample site of the distribution Unit."""
    samples = {name: site["fn"] for name, site in trace.items() if site["type"] == "sample"}
    latent = {*potential.mean, *potential.held}
    return [name for name, fn in samples.items() if name not in latent and not isinstance(fn, dist.Unit)]


def sites_at(potential: Potential, z: Float[Array, " k"]) -> dict[str, Array]:
    """All latent sites in their supports."""
    trace = potential.trace(z)
    return {name: trace[name]["value"] for name in (*potential.mean, *potential.held)}


def log_joint_and_law(potential: Potential, z: Float[Array, " k"]) -> tuple[Float[Array, ""], dict[str, Array]]:
    """-U in nats, and the `statistics` of the law."""
    return -potential.value(z), statistics(potential.trace(z))


@eqx.filter_jit
def at_draws(
    function: Callable[[Potential, Float[Array, " k"]], Any],
    potential: Potential,
    precision: Precision,
    key: PRNGKeyArray,
    draws: int,
) -> Any:
    """What a function gives at draws from the Gaussian, the same draws for the same key."""
    return jax.vmap(lambda z: function(potential, z))(potential.centre() + precision.sample(key, draws))


@eqx.filter_jit
def sampled(
    potential: Potential, precision: Precision, key: PRNGKeyArray, draws: int, args: tuple, kwargs: dict
) -> SampledPredictive:
    """Predictions of the model called with `args` and `kwargs` at the draws that `at_draws` has for this key."""
    latent = at_draws(sites_at, potential, precision, key, draws)
    data_key = jax.random.fold_in(key, 1)
    names = _data_names(potential, potential.trace(potential.centre(), (args, kwargs)))
    # Bound here: the model may have an argument that is called as one of NumPyro's own is, such as rng_key.
    model = partial(potential.model, *args, **kwargs)
    drawn = Predictive(_Unobserved(model), latent, return_sites=names, parallel=True)(data_key)
    densities = at_draws(
        lambda potential, z: log_likelihood(potential.trace(z, (args, kwargs))), potential, precision, key, draws
    )
    return SampledPredictive(
        posterior={name: latent[name] for name in potential.sites},
        posterior_predictive=drawn,
        log_likelihood=densities,
        log_density={name: logsumexp(values, axis=0) - math.log(draws) for name, values in densities.items()},
    )


@eqx.filter_jit
def linearised(
    potential: Potential, precision: Precision, site: str, args: tuple, kwargs: dict
) -> LinearisedPredictive:
    """The outputs of `site` for the model called with `args` and `kwargs`, linear in the parameters around the mode."""

    def distribution(z: Float[Array, " k"]) -> tuple[dist.Distribution, dist.Distribution]:
        """That of the site, and the one behind expansion and masks; the model may be called without its data."""
        trace = potential.trace(z, (args, kwargs))
        names = _data_names(potential, trace)
        if site not in names:
            raise ValueError(f"site: got {site!r}; pass one of the model's sites of data, {', '.join(names)}.")
        return trace[site]["fn"], unwrapped(trace[site]["fn"])

    z = potential.centre()
    whole, base = distribution(z)
    kind = type(base)
    if kind not in _OUTPUT:
        names = ", ".join(known.__name__ for known in _OUTPUT)
        raise ValueError(f"site: {site!r} is {kind.__name__}, not one of {names}; use predictive() by sampling.")
    shape = (*whole.shape(), *(base.logits.shape[-1:] if kind is dist.CategoricalLogits else ()))

    def output(z: Float[Array, " k"]) -> Float[Array, "..."]:
        return jnp.broadcast_to(getattr(distribution(z)[1], _OUTPUT[kind]), shape)

    mean = output(z)
    jacobian = (jax.jacrev if mean.size < z.size else jax.jacfwd)(output)(z).reshape(mean.size, z.size)
    noise = jnp.broadcast_to(base.scale, whole.shape()) if kind is dist.Normal else None
    return LinearisedPredictive(site, _OUTPUT[kind], kind.__name__, mean, precision.covariance_of(jacobian), noise)
