"""What Laplace's approximation returns: a Gaussian in unconstrained coordinates, with draws and predictions from it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from prob_transformer._validation import (
    require_count,
    require_draws,
    require_finite,
    require_floating,
    require_positive,
)
from prob_transformer.files import provenance
from prob_transformer.inference.embedding_sites import processes
from prob_transformer.inference.joint import key_and_seed
from prob_transformer.inference.laplace.curvature import Curvature, Potential, covariance_product
from prob_transformer.inference.laplace.precision import IndefiniteCurvatureError, Precision
from prob_transformer.inference.laplace.predictive import (
    LinearisedPredictive,
    SampledPredictive,
    at_draws,
    linearised,
    log_joint_and_law,
    sampled,
    sites_at,
)
from prob_transformer.inference.law import NO_LAW, Law, law_of
from prob_transformer.inference.map import MapResult
from prob_transformer.inference.minimise import MapStatus
from prob_transformer.inference.result_tree import Allow, DataTree, Dims, datatree
from prob_transformer.sampling import named_solve_errors

# A square matrix of this many rows takes 800 MB in float64.
_LARGEST_DENSE = 10_000
_DRAWS = "the draws, as in laplace(mode, key=0)"


def require_small(name: str, size: int) -> None:
    """Refuse a matrix of `size` rows that is too large to be formed."""
    if size > _LARGEST_DENSE:
        raise ValueError(
            f"{name}: needs a dense matrix of {size} rows, above {_LARGEST_DENSE}; use structure='low-rank' or "
            "'diagonal', or fewer sites."
        )


def _finite_draws(drawn: Mapping[str, Float[Array, "draws ..."]], sites: tuple[str, ...]) -> dict[str, Array]:
    """Those of the sites. Raises ValueError if some overflow."""
    for name in sites:
        if not np.isfinite(np.asarray(drawn[name])).all():
            raise ValueError(
                f"draws: some of site {name!r} are inf or NaN in its support; its Gaussian is too wide for its "
                "transform. Use a tighter prior, or leave the site out of `sites`."
            )
    return {name: drawn[name] for name in sites}


class LaplaceResult(NamedTuple):
    """A Gaussian N(z*, P^-1) over the unconstrained coordinates z of the approximated sites, around a `mode`.

    `precision` is P in its structure, its parameters ordered by the names of the sites, each row by row;
    `log_evidence` in nats, exact where the posterior is Gaussian and `structure` keeps all of P. `posterior` and
    `to_datatree` have as many `draws` as `laplace` was asked for, from its `key`, a JAX random key or an integer seed.
    """

    mode: MapResult
    potential: Potential
    precision: Precision
    log_evidence: float
    structure: str
    curvature: Curvature
    rank: int | None
    key: PRNGKeyArray | int | None
    draws: int

    @property
    def status(self) -> MapStatus:
        """That of the mode, which is CONVERGED: `laplace` takes no other, and refuses an indefinite curvature."""
        return self.mode.status

    @property
    def sites(self) -> tuple[str, ...]:
        """The approximated sites, in the order of the parameters."""
        return self.potential.sites

    @property
    def mean(self) -> dict[str, Float[Array, "..."]]:
        """The mean of the Gaussian: the mode of the approximated sites, in unconstrained coordinates."""
        return self.potential.mean

    def covariance(self) -> Float[Array, "k k"]:
        """P^-1 in full. Raises ValueError for more parameters than a dense matrix should hold."""
        require_small("covariance", self.precision.size)
        return self.precision.covariance_of(jnp.eye(self.precision.size, dtype=self.potential.centre().dtype))

    def covariance_product(
        self, v: Float[Array, " k"], *, tolerance: float = 1e-6, max_steps: int = 1000
    ) -> Float[Array, " k"]:
        """P^-1 v with the whole curvature at the mode, whatever the structure keeps of it, by conjugate gradients.

        The structure preconditions them: this is what it is checked against, or replaced by, where there are more
        parameters than a dense matrix can hold. The relative residual |P x - v| / |v| of what is returned is at most
        `tolerance`. Raises ValueError for another shape or a v that is 0 or not finite, and where the residual is not
        reached in `max_steps`; IndefiniteCurvatureError where v^T P^-1 v <= 0.
        """
        v = require_floating("v", v)
        require_finite("v", v)
        require_positive("tolerance", tolerance)
        require_count("max_steps", max_steps, 1, "the number of steps allowed")
        if v.shape != (self.precision.size,) or not jnp.any(v):
            raise ValueError(f"v: has shape {v.shape}; pass ({self.precision.size},), not all 0.")
        bounds = jnp.asarray(tolerance, v.dtype), jnp.asarray(max_steps)
        x, residual, along = covariance_product(self.potential, self.precision, self.curvature, v, *bounds)
        if not residual <= tolerance:
            raise ValueError(
                f"tolerance: the relative residual is {float(residual):.1e} after at most {max_steps} steps, above "
                f"{tolerance:.1e}; raise max_steps or tolerance, use float64, or fit with a higher rank."
            )
        if not along > 0:
            raise IndefiniteCurvatureError(
                f"precision: not positive definite, v^T P^-1 v is {float(along):.6g}; find the mode again from another "
                "start, or use curvature='ggn'."
            )
        return x

    def sample(self, key: PRNGKeyArray, draws: int) -> dict[str, Float[Array, "draws ..."]]:
        """Draws of the approximated sites in their supports. Raises ValueError if some overflow there."""
        require_draws(key, draws)
        return _finite_draws(at_draws(sites_at, self.potential, self.precision, key, draws), self.sites)

    def _arguments(self, args: tuple | None, kwargs: Mapping[str, Any] | None) -> tuple[tuple, dict[str, Any]]:
        """Those given, or those of the fit where none are."""
        if args is None and kwargs is None:
            return self.potential.args, self.potential.kwargs
        return args or (), dict(kwargs or {})

    def predictive(
        self,
        key: PRNGKeyArray,
        draws: int,
        *,
        model_args: tuple | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> SampledPredictive:
        """Draws of the parameters and of the data under them, for the model called with these arguments.

        Without any, the arguments of the fit are used. Data that the call has are drawn anew, and judged by their log
        density. Held sites stay at the mode. Raises ValueError as `sample`.
        """
        require_draws(key, draws)
        arguments = self._arguments(model_args, model_kwargs)
        with named_solve_errors():
            predicted = jax.block_until_ready(sampled(self.potential, self.precision, key, draws, *arguments))
        _finite_draws(predicted.posterior, self.sites)
        return predicted

    def linearised(
        self, site: str, *, model_args: tuple | None = None, model_kwargs: Mapping[str, Any] | None = None
    ) -> LinearisedPredictive:
        """The logits or mean of an observed site as a Gaussian, for the model called with these arguments.

        Without any, the arguments of the fit are used. Raises ValueError for a site that is not normal, categorical or
        Bernoulli by logits, or is not observed in the model.
        """
        return linearised(self.potential, self.precision, site, *self._arguments(model_args, model_kwargs))

    def _log_joint_and_law(self, key: PRNGKeyArray, draws: int) -> tuple[Float[Array, " draws"], Law]:
        log_joint, found = at_draws(log_joint_and_law, self.potential, self.precision, key, draws)
        if not found:
            return log_joint, NO_LAW
        worst = self.precision.sample(key, draws)[jnp.argmax(found["symmetric_eigenvalue"])]
        trace = self.potential.trace(self.potential.centre() + worst)
        return log_joint, law_of(processes(trace), np.asarray(found["certified"]))

    def law(self, key: PRNGKeyArray, draws: int) -> Law:
        """In which share of the draws that `sample` has for this key the likelihood is certified to be a law."""
        require_draws(key, draws)
        return self._log_joint_and_law(key, draws)[1]

    @property
    def posterior(self) -> dict[str, Float[Array, "1 draws ..."]]:
        """One chain of draws by site. Raises ValueError without a key, and as `sample`."""
        drawn = self.sample(key_and_seed(self.key, _DRAWS)[0], self.draws)
        return {name: values[None] for name, values in drawn.items()}

    def to_datatree(self, dims: Dims | None = None, *, allow: Allow = ()) -> DataTree:
        """One chain of draws: posterior, posterior_predictive, log_likelihood, sample_stats and observed_data.

        `sample_stats` has the log joint density of each draw in nats, in unconstrained coordinates. There is no status
        to `allow`. Raises ValueError without a key, as `sample`, and as `datatree` for `dims`.
        """
        key, seed = key_and_seed(self.key, _DRAWS)
        predicted = self.predictive(key, self.draws)
        log_joint, law = self._log_joint_and_law(key, self.draws)
        groups = {
            "posterior": predicted.posterior,
            "posterior_predictive": predicted.posterior_predictive,
            "log_likelihood": predicted.log_likelihood,
            "sample_stats": {"log_joint": log_joint},
        }
        own = {name: getattr(self, name) for name in ("structure", "curvature", "rank", "draws")}
        attrs = provenance(seed, {"method": "laplace", **own, "sites": list(self.sites)}) | {
            "objective": "negative log joint in nats, density in unconstrained coordinates, Gaussian at its mode",
            "log_evidence": self.log_evidence,
            "note": self.mode.note,
            "law": law.line,
        }
        one_chain = jax.tree.map(lambda value: np.asarray(value)[None], groups)
        return datatree({**one_chain, "observed_data": self.mode.observed_data}, dims, attrs)
