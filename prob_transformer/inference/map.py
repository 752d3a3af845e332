"""Maximum a posteriori estimates of a NumPyro model, found by L-BFGS in unconstrained coordinates z.

    constrained      argmax_z  log p(theta(z), y)
    unconstrained    argmax_z  log p(theta(z), y) + log|d theta / d z|

theta(z) are NumPyro's transforms onto the supports of the sites. A mode depends on the coordinates in which the density
is taken, so the space is always named: "constrained" is the mode of the density of the parameters themselves, what
AutoDelta finds; "unconstrained" is the one that Laplace's approximation of NumPyro's potential is built around. They
agree where every support is the whole space, as for embeddings.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray
from numpyro import handlers

from prob_transformer._dtypes import in_common_type
from prob_transformer._validation import require_count, require_positive
from prob_transformer.change_of_variables import residual_and_log_det_unchecked
from prob_transformer.files import provenance
from prob_transformer.inference.embedding_sites import processes
from prob_transformer.inference.joint import (
    Sites,
    Space,
    joint_and_trace,
    key_and_seed,
    log_likelihood,
    starting_point,
)
from prob_transformer.inference.law import Law, law_of
from prob_transformer.inference.minimise import Iterate, MapStatus, Minimum, minimise
from prob_transformer.inference.result_tree import Allow, DataTree, Dims, datatree, require_allowed

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

_STATS = ("objective", "gradient_norm", "converged", "steps", "crossings", "predicted_decrease", "at_rounding")


class MapResult(NamedTuple):
    """A maximum, or where the search for it ended: look at `converged` first.

    `model`, `model_args` and `model_kwargs` as `find_map` got them, with copies of NumPy arrays: all else is of these
    data, so for other data call `find_map` again; `parameters` by site, in their supports, and the same point as
    `unconstrained`; `objective`, the negative log joint in nats in the chosen `space`; `gradient_norm`, its largest
    derivative in unconstrained coordinates; `crossings`, how many of the `steps` were cut short because
    they crossed det = 0; `signs` of all determinants that were watched, at the end, empty if there were none;
    `predicted_decrease`, by how many nats a quasi-Newton step would lower the objective, infinite where steps were
    still long; `at_rounding`, whether the rounding of the dtype ended the search before the gradient fell to the
    `tolerance`, which `note` then says. `log_likelihood` and `law` run the model once more, at the point.
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
    signs: Float[Array, " s"]
    observed_data: dict[str, Num[Array, "..."]]
    seed: int | None
    tolerance: float
    predicted_decrease: float = 0.0
    at_rounding: bool = False

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

    @property
    def posterior(self) -> dict[str, Float[np.ndarray, "1 1 ..."]]:
        """The parameters as one chain with one draw."""
        return _one_draw(self.parameters)

    @property
    def _trace(self) -> dict[str, dict[str, Any]]:
        at_point = handlers.substitute(self.model, data=self.parameters)
        return handlers.trace(at_point).get_trace(*self.model_args, **self.model_kwargs)

    @property
    def log_likelihood(self) -> dict[str, Float[Array, "..."]]:
        """The log density in nats of every observed site, summed over its event alone."""
        return log_likelihood(self._trace)

    @property
    def law(self) -> Law:
        """Whether the likelihood at the point is certified to be a probability law."""
        return law_of(processes(self._trace))

    def to_datatree(self, dims: Dims | None = None, *, allow: Allow = ()) -> DataTree:
        """The point as one chain with one draw, in the groups posterior, log_likelihood, sample_stats, observed_data.

        Raises ValueError with status and remedy if the search did not converge and `allow` does not have its status,
        and as `datatree` for `dims`.
        """
        status = self.status.name.lower()
        if not self.converged:
            where = f"after {self.steps} steps, gradient norm {self.gradient_norm:.1e}"
            require_allowed({self.status: f"{where}: {_REMEDY[self.status]}"}, allow)
        stats = {name: getattr(self, name) for name in _STATS} | {"status": int(self.status)}
        if self.signs.size:
            stats["negative_signs"] = int((np.asarray(self.signs) < 0).sum())
        # Once for both, because every access to the property runs the model.
        trace = self._trace
        groups: dict[str, dict[str, Any]] = {
            "posterior": self.posterior,
            "log_likelihood": _one_draw(log_likelihood(trace)),
            "sample_stats": _one_draw(stats),
            "observed_data": self.observed_data,
        }
        configuration = {"method": "map", "space": self.space, "tolerance": self.tolerance}
        attrs = provenance(self.seed, configuration) | {
            "objective": f"negative log joint in nats, density in {self.space} coordinates",
            "status": status,
            "note": self.note,
            "law": law_of(processes(trace)).line,
        }
        return datatree(groups, dims, attrs)


def _one_draw(sites: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(value)[None, None] for name, value in sites.items()}


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
) -> tuple[Minimum, dict[str, Array], dict[str, Array]]:
    # One compilation a model, space and shapes: all that changes between calls comes in as an argument.
    flat, unravel = ravel_pytree(start)

    def density(point: Float[Array, " k"]) -> tuple[Float[Array, ""], tuple[dict[str, Array], Float[Array, " s"]]]:
        value, trace = joint_and_trace(model, args, kwargs, space, unravel(point))
        parameters = {name: trace[name]["value"] for name in start}
        found = processes({name: trace[name] for name in start}).values()
        watched = [
            residual_and_log_det_unchecked(*in_common_type((process.attention, here)), None).sign
            for process, here in found
        ]
        watched = watched if signs is None else [signs(parameters), *watched]
        flat_signs = jnp.concatenate([jnp.ravel(each) for each in watched]) if watched else jnp.zeros(0)
        return value, (parameters, flat_signs)

    # Traced once, however often the search calls it.
    @jax.jit
    def evaluate(point: Float[Array, " k"]) -> tuple[Iterate, dict[str, Array]]:
        (value, (parameters, flat_signs)), gradient = jax.value_and_grad(density, has_aux=True)(point)
        return Iterate(point, value, gradient, flat_signs), parameters

    found = minimise(lambda point: evaluate(point)[0], flat, tolerance, max_steps)
    return found, unravel(found.iterate.point), evaluate(found.iterate.point)[1]


def find_map(
    model: Callable,
    *,
    space: Space,
    model_args: tuple = (),
    model_kwargs: Mapping[str, Any] = {},
    init: Mapping[str, Float[Array, "..."]] = {},
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
    A step that changes the sign of some det J_i of embeddings that are latent is cut short, and so is one that changes
    what `signs` makes of the sites: the signs of other determinants, if given. The search stays on the side of each
    wall on which it starts, also where that is det < 0. A mode of latent embeddings is one in embedding coordinates: in
    noise coordinates there is no barrier term (theory section 5).

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
    start, _, observed = starting_point(model, model_args, model_kwargs, init, random_key)
    # A mode belongs to its data: the caller's arrays may be written to later.
    args, kwargs = jax.tree.map(
        lambda x: x.copy() if isinstance(x, np.ndarray) else x, (model_args, dict(model_kwargs))
    )
    found, unconstrained, parameters = _search(
        model, args, kwargs, space, signs, start, jnp.asarray(tolerance, float), jnp.asarray(max_steps, int)
    )
    last = found.iterate
    return MapResult(
        model=model,
        model_args=args,
        model_kwargs=kwargs,
        parameters=parameters,
        unconstrained=unconstrained,
        objective=float(last.value),
        gradient_norm=float(jnp.abs(last.gradient).max()),
        status=MapStatus(int(found.status)),
        space=space,
        steps=int(found.steps),
        crossings=int(found.crossings),
        signs=last.signs,
        observed_data=jax.tree.map(jnp.asarray, observed),
        seed=seed,
        tolerance=tolerance,
        predicted_decrease=float(found.predicted_decrease),
        at_rounding=bool(found.at_rounding),
    )
