"""Draws of NUTS, what is wrong with them, and their tree.

Thresholds: draws count as mixed where, for every unconstrained coordinate, split R-hat is at most 1.01 and the
effective sample size at least 100 a chain (Vehtari et al. 2021 recommend both; here without rank normalisation, as
NumPyro computes them).
"""

import enum
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Num
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin

from prob_transformer.files import provenance
from prob_transformer.inference.gauge import REMEDY, Gauge
from prob_transformer.inference.law import NO_LAW, Law
from prob_transformer.inference.reparam import noise_name
from prob_transformer.inference.results import Dims, datatree, for_arviz

if TYPE_CHECKING:
    import xarray as xr

LARGEST_R_HAT = 1.01
SMALLEST_ESS_PER_CHAIN = 100


class NutsStatus(enum.IntEnum):
    """What may be wrong with draws; the larger the worse.

    NOT_MIXED: R-hat or effective sample size miss their thresholds. PAST_BOUNDARY: some draw has det J <= 0 at a
    position, or met it on the way to the root. DIVERGED: a transition after warm-up diverged. ROOT_LOST: some draw has
    a position without a root (sampling through the noise). NOT_FINITE: no start of finite density was found, or a draw
    or its density is NaN or inf. OK says only that none of this was seen.
    """

    OK = 0
    NOT_MIXED = 1
    PAST_BOUNDARY = 2
    DIVERGED = 3
    ROOT_LOST = 4
    NOT_FINITE = 5


_REMEDY = {
    NutsStatus.NOT_MIXED: "draw more, warm up longer, or try the other setting of `embeddings`",
    NutsStatus.PAST_BOUNDARY: (
        "draws lie past the degeneracy boundary, where the law is not a normalised density; scale query and key down "
        "or add a barrier to the model"
    ),
    NutsStatus.DIVERGED: (
        "raise target_accept towards 1, reparameterise the model or try the other setting of `embeddings`"
    ),
    NutsStatus.ROOT_LOST: "use embeddings='direct' or float64, or scale query and key down",
    NutsStatus.NOT_FINITE: "pass an init at which the density and its gradient are finite, or look at the data",
}

# NumPyro's names to ArviZ's.
_ARVIZ = {"num_steps": "n_steps", "accept_prob": "acceptance_rate"}


class Diagnostics(NamedTuple):
    """Split R-hat and effective sample size of every coordinate, by site."""

    r_hat: dict[str, Float[np.ndarray, "..."]]
    ess: dict[str, Float[np.ndarray, "..."]]


def diagnose(unconstrained: Mapping[str, Num[Any, "chain draw ..."]]) -> Diagnostics:
    """R-hat and effective sample size by site; NaN for coordinates that never moved."""
    with np.errstate(divide="ignore", invalid="ignore"):
        arrays = {name: np.asarray(value, np.float64) for name, value in unconstrained.items()}
        r_hat = {name: np.asarray(split_gelman_rubin(value)) for name, value in arrays.items()}
        ess = {name: np.asarray(effective_sample_size(value)) for name, value in arrays.items()}
    return Diagnostics(r_hat, ess)


class NutsResult(NamedTuple):
    """Draws by site (chain, draw, ...), latent sites in their supports and deterministic ones; look at `status` first.

    `sample_stats` (chain, draw): diverging, num_steps, accept_prob, energy and potential_energy in nats, step_size,
    past_boundary and root_lost (numbers of positions), and for a model with an EmbeddingProcess whether the draw is
    certified and the symmetric_eigenvalue that decides it. `r_hat` and `ess` by latent site, of unconstrained
    coordinates, NaN where the draws are not finite; `deterministic` has those of deterministic sites, which do not
    count for the status. `log_likelihood` and `posterior_predictive` by observed site. `law` says in which share of
    draws the likelihood is certified to be a probability law, `gauges` which sites that have not mixed are not
    identified.
    """

    draws: dict[str, Num[np.ndarray, "chain draw ..."]]
    sample_stats: dict[str, Num[np.ndarray, "chain draw"]]
    r_hat: dict[str, Float[np.ndarray, "..."]]
    ess: dict[str, Float[np.ndarray, "..."]]
    log_likelihood: dict[str, Float[np.ndarray, "chain draw ..."]]
    posterior_predictive: dict[str, Num[np.ndarray, "chain draw ..."]]
    observed_data: dict[str, Num[Any, "..."]]
    finite: bool
    configuration: dict[str, Any]
    seed: int | None
    deterministic: Diagnostics = Diagnostics({}, {})
    law: Law = NO_LAW
    gauges: tuple[Gauge, ...] = ()

    @property
    def not_mixed(self) -> tuple[str, ...]:
        """The latent sites of which some coordinate misses the thresholds of R-hat and effective sample size."""
        least = SMALLEST_ESS_PER_CHAIN * self.sample_stats["diverging"].shape[0]
        # Written so that NaN counts as not mixed.
        return tuple(
            name
            for name, r_hat in self.r_hat.items()
            if not ((r_hat <= LARGEST_R_HAT).all() and (self.ess[name] >= least).all())
        )

    @property
    def problems(self) -> tuple[NutsStatus, ...]:
        """All that is wrong with the draws, the worst first; empty if nothing was seen."""
        stats = self.sample_stats
        seen: dict[NutsStatus, bool] = {
            NutsStatus.NOT_FINITE: not self.finite,
            NutsStatus.ROOT_LOST: bool(stats["root_lost"].any()),
            NutsStatus.DIVERGED: bool(stats["diverging"].any()),
            NutsStatus.PAST_BOUNDARY: bool(stats["past_boundary"].any()),
            NutsStatus.NOT_MIXED: bool(self.not_mixed),
        }
        return tuple(status for status, is_seen in seen.items() if is_seen)

    @property
    def status(self) -> NutsStatus:
        """The worst of the problems, or OK."""
        return next(iter(self.problems), NutsStatus.OK)

    def _extent(self, problem: NutsStatus) -> str:
        """How bad a problem is, in numbers."""
        stats = self.sample_stats
        draws = stats["diverging"].size
        if problem == NutsStatus.NOT_MIXED:
            r_hat = max((float(np.max(x)) for x in self.r_hat.values()), default=np.nan)
            ess = min((float(np.min(x)) for x in self.ess.values()), default=np.nan)
            return (
                f"largest R-hat {r_hat:.3f}, smallest effective sample size {ess:.0f} of {draws} draws; sites "
                f"{', '.join(self.not_mixed)}"
            )
        counted = {
            NutsStatus.PAST_BOUNDARY: "past_boundary",
            NutsStatus.DIVERGED: "diverging",
            NutsStatus.ROOT_LOST: "root_lost",
        }
        if problem in counted:
            return f"{int((stats[counted[problem]] > 0).sum())} of {draws} draws"
        return "NaN or inf"

    def _remedy(self, problem: NutsStatus) -> str:
        if problem != NutsStatus.NOT_MIXED or not self.gauges:
            return _REMEDY[problem]
        pairs = ", ".join(map(str, self.gauges))
        found = [
            f"{name} has R-hat {np.max(r_hat):.3f} and effective sample size {np.min(self.deterministic.ess[name]):.0f}"
            for name, r_hat in self.deterministic.r_hat.items()
        ]
        return f"{pairs}: {REMEDY}{'. Of the deterministic sites, ' if found else ''}{', '.join(found)}"

    def to_datatree(self, dims: Dims | None = None, *, allow: Collection[NutsStatus] = ()) -> "xr.DataTree":
        """All groups with dimensions chain and draw, the statistics under ArviZ's names.

        Raises ValueError with status and remedy unless every problem is in `allow`, for draws that are not finite in
        any case, and as `datatree` for `dims`.
        """
        refused = [p for p in self.problems if p not in allow or p == NutsStatus.NOT_FINITE]
        if refused:
            found = "; ".join(f"{p.name.lower()} ({self._extent(p)}): {self._remedy(p)}" for p in refused)
            names = ", ".join(f"NutsStatus.{p.name}" for p in refused)
            keep = (
                "" if NutsStatus.NOT_FINITE in refused else f". Pass allow=[{names}] to keep these draws all the same"
            )
            raise ValueError(f"status: {found}{keep}.")
        stats = {_ARVIZ.get(name, name): value for name, value in self.sample_stats.items()}
        groups = {
            "posterior": self.draws,
            "posterior_predictive": self.posterior_predictive,
            "log_likelihood": self.log_likelihood,
            "sample_stats": stats | {"lp": -stats["potential_energy"]},
            "observed_data": self.observed_data,
        }
        noise = noise_name("embeddings")
        known: Dims = {}
        if noise in self.draws:
            known = {noise: ("sequence", "position", "embedding_dim")[-(self.draws[noise].ndim - 2) :]}
        attrs = provenance(self.seed, {"method": "nuts", **self.configuration}) | {
            "objective": "negative log joint in nats, density in unconstrained coordinates",
            "status": ", ".join(p.name.lower() for p in self.problems) or "ok",
            "law": self.law.line,
        }
        return datatree(
            {name: arrays for name, arrays in groups.items() if arrays},
            {**known, **({} if dims is None else dims)},
            attrs,
        )

    def to_inferencedata(self, dims: Dims | None = None, **options: Any) -> Any:
        """What the installed ArviZ takes, from `to_datatree` with the same options: InferenceData or DataTree."""
        return for_arviz(self.to_datatree(dims, **options))
