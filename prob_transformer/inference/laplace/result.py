"""What Laplace's approximation returns: a Gaussian in unconstrained coordinates, with draws and predictions from it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from prob_transformer._validation import require_count
from prob_transformer.files import provenance
from prob_transformer.inference.joint import key_or_seed
from prob_transformer.inference.laplace.curvature import Curvature
from prob_transformer.inference.laplace.potential import Potential
from prob_transformer.inference.laplace.precision import Precision
from prob_transformer.inference.laplace.predictive import (
    LinearisedPredictive,
    SampledPredictive,
    draw,
    law_statistics,
    linearised,
    log_joint,
    sampled,
)
from prob_transformer.inference.law import NO_LAW, Law, law_of, processes
from prob_transformer.inference.map import MapResult
from prob_transformer.inference.result_tree import Dims, datatree, for_arviz
from prob_transformer.sampling import named_solve_errors

if TYPE_CHECKING:
    import xarray as xr

# A square matrix of this many rows takes 800 MB in float64.
_LARGEST_DENSE = 10_000


def require_small(name: str, size: int) -> None:
    """Refuse a matrix of `size` rows that is too large to be formed."""
    if size > _LARGEST_DENSE:
        raise ValueError(
            f"{name}: needs a dense matrix of {size} rows, above {_LARGEST_DENSE}; use structure='low-rank' or "
            "'diagonal', or fewer sites."
        )


def _require_finite_draws(drawn: Mapping[str, Float[Array, "draws ..."]]) -> None:
    for name, values in drawn.items():
        if not np.isfinite(np.asarray(values)).all():
            raise ValueError(
                f"draws: some of site {name!r} are inf or NaN in its support; its Gaussian is too wide for its "
                "transform. Use a tighter prior, or leave the site out of `sites`."
            )


class LaplaceResult(NamedTuple):
    """A Gaussian N(z*, P^-1) over the unconstrained coordinates z of the approximated sites.

    `precision` is P in its structure, its parameters ordered by the names of the sites, each row by row;
    `log_evidence` in nats, exact where the posterior is Gaussian and `structure` keeps all of P; `at` the mode that it
    was built on.
    """

    potential: Potential
    precision: Precision
    log_evidence: float
    structure: str
    curvature: Curvature
    rank: int | None
    at: MapResult

    @property
    def sites(self) -> tuple[str, ...]:
        """The approximated sites, in the order of the parameters."""
        return self.potential.sites

    @property
    def mean(self) -> dict[str, Float[Array, "..."]]:
        """The mean of the Gaussian: the mode of the approximated sites, in unconstrained coordinates."""
        return self.potential.chosen()

    @property
    def unconstrained(self) -> dict[str, Float[Array, "..."]]:
        """The mode of all sites in unconstrained coordinates, with those that are held at it."""
        return self.at.unconstrained

    def covariance(self) -> Float[Array, "k k"]:
        """P^-1 in full. Raises ValueError for more parameters than a dense matrix should hold."""
        require_small("covariance", self.precision.size)
        return self.precision.covariance_of(jnp.eye(self.precision.size, dtype=self.potential.centre().dtype))

    def sample(self, key: PRNGKeyArray, draws: int) -> dict[str, Float[Array, "draws ..."]]:
        """Draws of the approximated sites in their supports. Raises ValueError if some overflow there."""
        require_count("draws", draws, 1, "the number of draws")
        drawn = draw(self.potential, self.precision, key, draws)
        _require_finite_draws(drawn)
        return drawn

    def predictive(self, key: PRNGKeyArray, draws: int, *args: Any, **kwargs: Any) -> SampledPredictive:
        """Draws of the parameters and of the data under them, for the model called with `args` and `kwargs`.

        Without any, the arguments of the fit are used. Data that the call has are drawn anew, and judged by their log
        density. Held sites stay at the mode. Raises ValueError as `sample`.
        """
        require_count("draws", draws, 1, "the number of draws")
        if not args and not kwargs:
            args, kwargs = self.potential.args, self.potential.kwargs
        with named_solve_errors():
            predicted = jax.block_until_ready(sampled(self.potential, self.precision, key, draws, args, kwargs))
        _require_finite_draws(predicted.posterior)
        return predicted

    def linearised(self, site: str, *args: Any, **kwargs: Any) -> LinearisedPredictive:
        """The logits or mean of an observed site as a Gaussian, for the model called with `args` and `kwargs`.

        Without any, the arguments of the fit are used. Raises ValueError for a site that is not normal, categorical or
        Bernoulli by logits, or is not observed in the model.
        """
        if not args and not kwargs:
            args, kwargs = self.potential.args, self.potential.kwargs
        return linearised(self.potential, self.precision, site, args, kwargs)

    def law(self, key: PRNGKeyArray, draws: int) -> Law:
        """In which share of the draws that `sample` has for this key the likelihood is certified to be a law."""
        require_count("draws", draws, 1, "the number of draws")
        found = law_statistics(self.potential, self.precision, key, draws)
        if not found:
            return NO_LAW
        z = self.potential.centre() + self.precision.sample(key, draws)[jnp.argmax(found["symmetric_eigenvalue"])]
        return law_of(processes(self.potential.trace(z)), np.asarray(found["certified"]))

    def to_datatree(
        self,
        dims: Dims | None = None,
        *,
        key: PRNGKeyArray | None = None,
        seed: int | None = None,
        draws: int = 1000,
    ) -> "xr.DataTree":
        """One chain of draws: posterior, posterior_predictive, log_likelihood, sample_stats and observed_data.

        `sample_stats` has the log joint density of each draw in nats, in unconstrained coordinates. Draws come from
        `key`, or from `jax.random.key(seed)`; `seed` is also what the tree is labelled with. Raises ValueError without
        either, as `sample`, and as `datatree` for `dims`.
        """
        key = key_or_seed(key, seed, "the draws")
        if key is None:
            raise ValueError("key: got None; pass a JAX random key, or a seed.")
        predicted = self.predictive(key, draws)
        groups = {
            "posterior": predicted.posterior,
            "posterior_predictive": predicted.posterior_predictive,
            "log_likelihood": predicted.log_likelihood,
            "sample_stats": {"log_joint": log_joint(self.potential, self.precision, key, draws)},
        }
        drawn = {
            group: {name: np.asarray(value)[None] for name, value in sites.items()} for group, sites in groups.items()
        }
        configuration = {
            "method": "laplace",
            "structure": self.structure,
            "curvature": self.curvature,
            "rank": self.rank,
            "sites": list(self.sites),
            "draws": draws,
        }
        attrs = provenance(seed, configuration) | {
            "objective": "negative log joint in nats, density in unconstrained coordinates, Gaussian at its mode",
            "log_evidence": self.log_evidence,
            "note": self.at.note,
            "law": self.law(key, draws).line,
        }
        return datatree({**drawn, "observed_data": self.at.observed_data}, dims, attrs)

    def to_inferencedata(self, dims: Dims | None = None, **options: Any) -> Any:
        """What the installed ArviZ takes, from `to_datatree` with the same options: InferenceData or DataTree."""
        return for_arviz(self.to_datatree(dims, **options))
