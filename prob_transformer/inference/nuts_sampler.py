"""NUTS: NumPyro's transition, in one compiled loop over chains side by side, and what is wrong with its draws.

    potential    U(z) = -log p(theta(z), y) - log|d theta / d z|                       in nats, z unconstrained

Embeddings are sampled "direct", with the density of the EmbeddingProcess, or through their "noise" (see
embedding_sites). In the safe region both have one posterior. Past the boundary they differ: "direct" has the |det J|
density, whose mass exceeds 1 and whose walls det J = 0 the chain may jump; "noise" has the law of the root finder.
Draws that show it have a status that says so.

Thresholds: draws count as mixed where, for every unconstrained coordinate, split R-hat is at most 1.01 and the
effective sample size at least 100 a chain (Vehtari et al. 2021 recommend both; here without rank normalisation, as
NumPyro computes them).
"""

import contextlib
import enum
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, PRNGKeyArray
from numpyro import handlers
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer.util import potential_energy

from prob_transformer._validation import require_choice, require_count, require_floating
from prob_transformer.change_of_variables import residual_and_log_det
from prob_transformer.files import provenance
from prob_transformer.inference.chains import run_chains
from prob_transformer.inference.embedding_sites import NOISE, position_scales, processes, through_noise
from prob_transformer.inference.gauge import REMEDY, Gauge, gauges
from prob_transformer.inference.joint import key_and_seed, starting_point
from prob_transformer.inference.law import NO_LAW, Law, law_of
from prob_transformer.inference.result_tree import Allow, DataTree, Dims, datatree, require_allowed

Embeddings = Literal["direct", "noise"]

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

# Problems that the statistics of every draw show.
_COUNTED = {
    NutsStatus.PAST_BOUNDARY: "past_boundary",
    NutsStatus.DIVERGED: "diverging",
    NutsStatus.ROOT_LOST: "root_lost",
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
    """Draws, and what they are worth; look at `status` first.

    `posterior` by site (chain, draw, ...), latent sites in their supports and deterministic ones; `sample_stats`
    (chain, draw): diverging, num_steps, accept_prob, energy and potential_energy in nats, step_size, past_boundary and
    root_lost (numbers of positions), and for a model with an EmbeddingProcess whether the draw is certified and the
    symmetric_eigenvalue that decides it. `r_hat` and `ess` by latent site, of unconstrained coordinates, NaN where the
    draws are not finite; `deterministic` has those of deterministic sites, which do not count for the status.
    `log_likelihood` and `posterior_predictive` by observed site. `law` says in which share of draws the likelihood is
    certified to be a probability law, `gauges` which sites that have not mixed are not identified.
    """

    posterior: dict[str, Num[np.ndarray, "chain draw ..."]]
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
        counted = [problem for problem, name in _COUNTED.items() if self.sample_stats[name].any()]
        others = {NutsStatus.NOT_FINITE: not self.finite, NutsStatus.NOT_MIXED: bool(self.not_mixed)}
        return tuple(sorted(counted + [problem for problem, seen in others.items() if seen], reverse=True))

    @property
    def status(self) -> NutsStatus:
        """The worst of the problems, or OK."""
        return next(iter(self.problems), NutsStatus.OK)

    def _explain(self, problem: NutsStatus) -> str:
        """How bad a problem is, in numbers, and what to do about it."""
        draws = self.sample_stats["diverging"].size
        if problem in _COUNTED:
            return f"({int((self.sample_stats[_COUNTED[problem]] > 0).sum())} of {draws} draws): {_REMEDY[problem]}"
        if problem == NutsStatus.NOT_FINITE:
            return f"(NaN or inf): {_REMEDY[problem]}"
        r_hat = max((float(np.max(x)) for x in self.r_hat.values()), default=np.nan)
        ess = min((float(np.min(x)) for x in self.ess.values()), default=np.nan)
        extent = f"(largest R-hat {r_hat:.3f}, smallest effective sample size {ess:.0f} of {draws} draws; sites "
        extent += f"{', '.join(self.not_mixed)})"
        if not self.gauges:
            return f"{extent}: {_REMEDY[problem]}"
        found = [
            f"{name} has R-hat {np.max(r_hat):.3f} and effective sample size {np.min(self.deterministic.ess[name]):.0f}"
            for name, r_hat in self.deterministic.r_hat.items()
        ]
        identified = f". Of the deterministic sites, {', '.join(found)}" if found else ""
        return f"{extent}: {', '.join(map(str, self.gauges))}: {REMEDY}{identified}"

    def to_datatree(self, dims: Dims | None = None, *, allow: Allow = ()) -> DataTree:
        """All groups with dimensions chain and draw, the statistics under ArviZ's names.

        Raises ValueError with status and remedy unless every problem is in `allow`, for draws that are not finite in
        any case, and as `datatree` for `dims`.
        """
        require_allowed({problem: self._explain(problem) for problem in self.problems}, allow, [NutsStatus.NOT_FINITE])
        stats = {_ARVIZ.get(name, name): value for name, value in self.sample_stats.items()}
        groups = {
            "posterior": self.posterior,
            "posterior_predictive": self.posterior_predictive,
            "log_likelihood": self.log_likelihood,
            "sample_stats": stats | {"lp": -stats["potential_energy"]},
            "observed_data": self.observed_data,
        }
        attrs = provenance(self.seed, {"method": "nuts", **self.configuration}) | {
            "objective": "negative log joint in nats, density in unconstrained coordinates",
            "status": ", ".join(p.name.lower() for p in self.problems) or "ok",
            "law": self.law.line,
        }
        return datatree({name: arrays for name, arrays in groups.items() if arrays}, dims, attrs)


@contextlib.contextmanager
def _listener(progress: Callable[[int], None] | bool, transitions: int) -> Iterator[Callable[[int], None] | None]:
    """What to tell of progress: the function given, a bar on standard error where that is a terminal, or nothing."""
    if not (progress is True and sys.stderr.isatty()):
        yield progress if callable(progress) else None
        return
    from tqdm import tqdm

    with tqdm(total=transitions, desc="nuts, compiling", unit="transition") as bar:

        def show(done: int) -> None:
            bar.set_description("nuts", refresh=False)
            bar.update(done - bar.n)

        yield show


def _law(model: Callable, args: tuple, kwargs: dict, values: dict[str, Any], stats: dict[str, Any]) -> Law:
    """The law behind all draws, whose mass is that of the draw with the largest eigenvalue of A + A^T."""
    if "certified" not in stats:
        return NO_LAW
    worst = np.unravel_index(np.argmax(stats["symmetric_eigenvalue"]), stats["certified"].shape)
    point = {name: value[worst] for name, value in values.items()}
    trace = handlers.trace(handlers.substitute(model, data=point)).get_trace(*args, **kwargs)
    return law_of(processes(trace), stats["certified"])


_potential = eqx.filter_jit(potential_energy)


def nuts(
    key: PRNGKeyArray | int,
    model: Callable,
    *,
    model_args: tuple = (),
    model_kwargs: Mapping[str, Any] = {},
    warmup: int = 500,
    draws: int = 1000,
    chains: int = 2,
    embeddings: Embeddings = "direct",
    target_accept: Float[Array, ""] | float = 0.8,
    init: Mapping[str, Float[Array, "..."]] = {},
    dense_mass: bool = False,
    max_tree_depth: int = 10,
    predictive: bool = True,
    progress: Callable[[int], None] | bool = True,
) -> NutsResult:
    """Draws from the posterior of a NumPyro model given its arguments; look at the result's `status`.

    `key` is a JAX random key, or an integer seed, which results are then labelled with. All chains start at the
    values in `init`, by site and in their supports, and at random where it has none. `embeddings` says how sites of an
    EmbeddingProcess are sampled: "direct", or by their "noise"; these have one posterior in the safe region, and past
    the boundary the |det J| density and the law of the root finder (module docstring). `predictive` draws observed
    sites anew given each draw. `progress` is True for a bar where standard error is a terminal, False for none, or a
    function that is called with the number of transitions made, about a hundred times.

    Compiled once for a model, the shapes of its arrays and the counts given: pass the same function again, not a new
    closure. Chains that go wrong are returned with their `NutsStatus`. Raises ValueError for unknown names, shapes or
    values in `init`, discrete latent sites, empty data, and other bad arguments.
    """
    require_count("warmup", warmup, 0, "the number of transitions that adapt and are dropped")
    require_count("draws", draws, 4, "halves of chains are compared")
    require_count("chains", chains, 1, "the number of chains")
    require_count("max_tree_depth", max_tree_depth, 1, "the number of doublings of a trajectory")
    require_choice("embeddings", embeddings, get_args(Embeddings))
    is_known = not isinstance(target_accept, jax.core.Tracer)
    if require_floating("target_accept", target_accept).ndim or (is_known and not 0 < float(target_accept) < 1):
        raise ValueError(f"target_accept: got {target_accept}; pass a share of steps between 0 and 1.")
    random_key, seed = key_and_seed(key, "the draws")
    point_key, run_key = jax.random.split(random_key)
    start, trace, observed = starting_point(model, model_args, model_kwargs, init, point_key)
    args, kwargs = model_args, dict(model_kwargs)
    through = {name: found for name, found in processes(trace).items() if name in start and embeddings == "noise"}
    if embeddings == "noise" and not through:
        raise ValueError("embeddings: is 'noise', but no latent site is an EmbeddingProcess; pass 'direct'.")
    noise_sites = tuple(sorted(through))
    start = {name: value for name, value in start.items() if name not in through} | {
        name + NOISE: residual_and_log_det(process.attention, value).residual / position_scales(process)
        for name, (process, value) in through.items()
    }
    given = {name + NOISE if name in noise_sites else name for name in init}
    # NumPyro draws momenta in JAX's default precision whatever that of the positions.
    start = {name: jnp.asarray(value, jnp.result_type(float)) for name, value in start.items()}
    sizes = {"warmup": warmup, "draws": draws, "chains": chains}
    with _listener(progress, warmup + draws) as listener:
        kept = run_chains(
            model,
            args,
            kwargs,
            start,
            run_key,
            target_accept,
            listener,
            max_tree_depth=max_tree_depth,
            dense_mass=dense_mass,
            predictive=predictive,
            given=tuple(sorted(given)),
            noise_sites=noise_sites,
            **sizes,
        )
    unconstrained, stats, values, likelihood, predicted, started = jax.tree.map(np.asarray, kept)
    arrays = [*unconstrained.values(), *values.values(), stats["potential_energy"]]
    finite = bool(started) and all(np.isfinite(array).all() for array in arrays)
    r_hat, ess = diagnose(unconstrained)
    latent = {name for name, site in trace.items() if site["type"] == "sample"} | set(unconstrained)
    result = NutsResult(
        posterior=values,
        sample_stats=stats,
        r_hat=r_hat,
        ess=ess,
        log_likelihood=likelihood,
        posterior_predictive=predicted,
        observed_data=observed,
        finite=finite,
        configuration={**sizes, "embeddings": embeddings, "target_accept": float(target_accept)},
        seed=seed,
        deterministic=diagnose({name: value for name, value in values.items() if name not in latent}),
        law=_law(model, args, kwargs, values, stats) if finite else NO_LAW,
    )
    if not finite or not result.not_mixed:
        return result
    sampled = through_noise(model) if noise_sites else model
    last = {name: jnp.asarray(value[0, -1]) for name, value in unconstrained.items()}
    return result._replace(gauges=gauges(partial(_potential, sampled, args, kwargs), last, result.not_mixed))
