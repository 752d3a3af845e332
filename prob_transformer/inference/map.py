"""Maximum a posteriori estimates of a NumPyro model, found by L-BFGS in unconstrained coordinates z.

    constrained      argmax_z  log p(theta(z), y)
    unconstrained    argmax_z  log p(theta(z), y) + log|d theta / d z|

theta(z) are NumPyro's transforms onto the supports of the sites. A mode depends on the coordinates in which the density
is taken, so the space is always named: "constrained" is the mode of the density of the parameters themselves, what
AutoDelta finds; "unconstrained" is the one that Laplace's approximation of NumPyro's potential is built around. They
agree where every support is the whole space, as for embeddings.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray
from numpyro import handlers
from numpyro.infer.util import constrain_fn

from prob_transformer._validation import require_count, require_positive
from prob_transformer.attention import Attention
from prob_transformer.change_of_variables import residual_and_log_det
from prob_transformer.embedding_process import EmbeddingProcess
from prob_transformer.files import provenance
from prob_transformer.inference.joint import (
    Sites,
    Space,
    key_and_seed,
    negative_log_joint,
    observed_data,
    starting_point,
)
from prob_transformer.inference.law import NO_LAW, Law, law_of, processes
from prob_transformer.inference.minimise import Iterate, MapStatus, Minimum, minimise
from prob_transformer.inference.results import Dims, datatree, for_arviz

if TYPE_CHECKING:
    import xarray as xr

Signs = Callable[[Sites], Float[Array, "..."]]

_REMEDY = {
    MapStatus.MAX_STEPS: (
        "raise max_steps; if parameters run off without end there is no maximum inside the support (the mode may lie "
        "on its edge): use space='unconstrained' or another prior"
    ),
    MapStatus.LINE_SEARCH_FAILED: (
        "no step along the direction was both lower and on this side of every wall; if the gradient norm is small, "
        "rounding has been reached: raise tolerance or use float64; if steps were cut short at det = 0, add a barrier "
        "to the model or start elsewhere"
    ),
    MapStatus.NOT_FINITE: "the objective or its gradient is NaN or inf at the start or after every step; change init",
    MapStatus.INFEASIBLE_START: "a determinant is 0 or NaN at the start; pass an init away from the wall",
    MapStatus.FLAT: (
        "the gradient vanishes, and around the point as well, so this is no maximum: the mode may lie on the edge of a "
        "support, or a site hardly matters to the density; use space='unconstrained', another prior, another start, or "
        "a smaller tolerance"
    ),
}


class _EmbeddingSigns(eqx.Module):
    attention: Attention

    def __call__(self, parameters: Sites) -> Float[Array, "..."]:
        if "embeddings" not in parameters:
            raise ValueError(
                f"signs: the model has no site 'embeddings' but {sorted(parameters)}; pass your own function."
            )
        return residual_and_log_det(self.attention, parameters["embeddings"]).sign


def embedding_signs(attention: Attention) -> Signs:
    """Signs of det J_i (..., n) at the site "embeddings" under a known attention, to be passed to `find_map`."""
    if not isinstance(attention, Attention):
        raise ValueError(f"attention: got {type(attention).__name__}; pass an Attention.")
    return _EmbeddingSigns(attention)


class MapResult(NamedTuple):
    """A maximum, or where the search for it ended: look at `converged` first.

    `model`, `model_args` and `model_kwargs` as `find_map` got them; `parameters` by site, in their supports, and the
    same point as `unconstrained`; `objective`, the negative log joint in nats in the chosen `space`; `gradient_norm`,
    its largest derivative in unconstrained coordinates; `crossings`, how many of the `steps` were cut short because
    they crossed det = 0; `signs` at the end, None if none were watched; `predicted_decrease`, by how many nats a
    quasi-Newton step would lower the objective, infinite where steps were still long; `at_rounding`, whether the
    rounding of the dtype ended the search before the gradient fell to the `tolerance`, which `note` then says; `law`,
    whether the likelihood at the point is certified to be a probability law.
    """

    model: Callable
    model_args: tuple
    model_kwargs: dict[str, Any]
    parameters: dict[str, Float[Array, "..."]]
    unconstrained: dict[str, Float[Array, "..."]]
    objective: float
    gradient_norm: float
    status: MapStatus
    space: Space
    steps: int
    crossings: int
    signs: Float[Array, "..."] | None
    log_likelihood: dict[str, Float[Array, "..."]]
    observed_data: dict[str, Num[Array, "..."]]
    seed: int | None
    tolerance: float
    predicted_decrease: float = 0.0
    at_rounding: bool = False
    law: Law = NO_LAW

    @property
    def converged(self) -> bool:
        """Whether the gradient vanishes to within the tolerance or its rounding, at a point reached uphill, in a
        density curved there.

        `status` names the reason if not. A saddle is not told from a maximum: the Hessian is, which `laplace` looks at.
        """
        return self.status == MapStatus.CONVERGED

    @property
    def note(self) -> str:
        """What to know of a search that rounding ended, empty for any other."""
        if not self.at_rounding:
            return ""
        dtypes = sorted({np.asarray(value).dtype.name for value in self.unconstrained.values()})
        return (
            f"converged at the resolution of {', '.join(dtypes)}: the gradient norm {self.gradient_norm:.1e} exceeds "
            f"the tolerance {self.tolerance:.1e} by rounding alone, and the predicted decrease of "
            f"{self.predicted_decrease:.1e} nats is below the rounding of the objective"
        )

    def to_datatree(self, dims: Dims | None = None, *, allow_unconverged: bool = False) -> "xr.DataTree":
        """The point as one chain with one draw, in the groups posterior, log_likelihood, sample_stats, observed_data.

        Raises ValueError with status and remedy if the search did not converge and that is not allowed, and as
        `datatree` for `dims`.
        """
        if not (self.converged or allow_unconverged):
            raise ValueError(
                f"status: {self.status.name.lower()} after {self.steps} steps, gradient norm {self.gradient_norm:.1e}: "
                f"{_REMEDY[self.status]}. Pass allow_unconverged=True to keep this point all the same."
            )
        stats: dict[str, Any] = {
            "objective": self.objective,
            "gradient_norm": self.gradient_norm,
            "converged": self.converged,
            "status": int(self.status),
            "steps": self.steps,
            "crossings": self.crossings,
            "predicted_decrease": self.predicted_decrease,
            "at_rounding": self.at_rounding,
        }
        if self.signs is not None:
            stats["negative_signs"] = int((np.asarray(self.signs) < 0).sum())
        groups = {"posterior": self.parameters, "log_likelihood": self.log_likelihood, "sample_stats": stats}
        drawn = {
            group: {name: np.asarray(value)[None, None] for name, value in sites.items()}
            for group, sites in groups.items()
        }
        configuration = {"method": "map", "space": self.space, "tolerance": self.tolerance}
        attrs = provenance(self.seed, configuration) | {
            "objective": f"negative log joint in nats, density in {self.space} coordinates",
            "status": self.status.name.lower(),
            "note": self.note,
            "law": self.law.line,
        }
        return datatree({**drawn, "observed_data": self.observed_data}, dims, attrs)

    def to_inferencedata(self, dims: Dims | None = None, **options: Any) -> Any:
        """What the installed ArviZ takes, from `to_datatree` with the same options: InferenceData or DataTree."""
        return for_arviz(self.to_datatree(dims, **options))


@eqx.filter_jit
def _search(
    model: Callable,
    args: tuple,
    kwargs: dict,
    space: Space,
    signs: Signs | None,
    start: Sites,
    tolerance: Float[Array, ""],
    max_steps: Int[Array, ""],
) -> tuple[
    Minimum,
    dict[str, Array],
    dict[str, Array],
    dict[str, Array],
    dict[str, Array],
    dict[str, tuple[EmbeddingProcess, Array]],
]:
    # One compilation a model, space and shapes: all that changes between calls comes in as an argument.
    flat, unravel = ravel_pytree(start)

    def evaluate(point: Float[Array, " k"]) -> Iterate:
        value, gradient = jax.value_and_grad(lambda z: negative_log_joint(model, args, kwargs, space, unravel(z)))(
            point
        )
        watched = jnp.ones(()) if signs is None else signs(constrain_fn(model, args, kwargs, unravel(point)))
        return Iterate(point, value, gradient, watched)

    found: Minimum = minimise(evaluate, flat, tolerance, max_steps)
    unconstrained = unravel(found.iterate.point)
    parameters = constrain_fn(model, args, kwargs, unconstrained)
    trace = handlers.trace(handlers.substitute(model, data=parameters)).get_trace(*args, **kwargs)
    log_likelihood = {name: trace[name]["fn"].log_prob(value) for name, value in observed_data(trace).items()}
    return found, parameters, unconstrained, log_likelihood, observed_data(trace), processes(trace)


def find_map(
    model: Callable,
    *,
    space: Space,
    model_args: tuple = (),
    model_kwargs: Mapping[str, Any] = {},
    init: Mapping[str, Float[Array, "..."]] | None = None,
    key: PRNGKeyArray | int | None = None,
    max_steps: int = 500,
    tolerance: float = 1e-6,
    signs: Signs | None = None,
) -> MapResult:
    """The maximum of the joint density of a NumPyro model given its arguments, in the space named.

    Latent sites start at their values in `init`, in their supports, and where it has none at a random point drawn from
    `key`, a JAX random key or an integer seed, which results are then labelled with. The search ends when no
    derivative exceeds `tolerance`, in nats per unit of the unconstrained coordinates, and steps have become short; or
    at the best point that rounding lets it reach, where no step could show a lower objective (see `MapResult.note`).
    `signs` maps the sites to signs of determinants, such as `embedding_signs(attention)`: a step that changes one is
    cut short. The search stays on the side of each wall on which it starts, also where that is det < 0. A mode of
    latent embeddings is one in embedding coordinates: in noise coordinates there is no barrier term (theory section 5).

    Compiled once for a model, the shapes of its arrays and the values of what is not an array: pass the same function
    again, not a new closure. A search that fails is returned with its `MapStatus`. Raises ValueError for an unknown
    space, names, shapes or values in `init`, discrete latent sites, and empty data.
    """
    if space not in get_args(Space):
        raise ValueError(
            f"space: got {space!r}; pass one of {', '.join(get_args(Space))}, for modes differ between them."
        )
    require_count("max_steps", max_steps, 1, "the number of steps allowed")
    require_positive("tolerance", tolerance)
    random_key, seed = (None, None) if key is None else key_and_seed(key, "the random start")
    kwargs = dict(model_kwargs)
    start = starting_point(model, model_args, kwargs, {} if init is None else init, random_key)
    found, parameters, unconstrained, log_likelihood, observed, embedding_processes = _search(
        model, model_args, kwargs, space, signs, start, jnp.asarray(tolerance, float), jnp.asarray(max_steps, int)
    )
    last = found.iterate
    return MapResult(
        model=model,
        model_args=model_args,
        model_kwargs=kwargs,
        parameters=parameters,
        unconstrained=unconstrained,
        objective=float(last.value),
        gradient_norm=float(jnp.abs(last.gradient).max()),
        status=MapStatus(int(found.status)),
        space=space,
        steps=int(found.steps),
        crossings=int(found.crossings),
        signs=None if signs is None else last.signs,
        log_likelihood=log_likelihood,
        observed_data=observed,
        seed=seed,
        tolerance=tolerance,
        predicted_decrease=float(found.predicted_decrease),
        at_rounding=bool(found.at_rounding),
        law=law_of(embedding_processes, None),
    )
