"""NumPyro's Predictive, with errors that name what went wrong in their first line."""

from typing import Any

import jax
import numpyro.infer
from jaxtyping import Array, PRNGKeyArray

from prob_transformer.sampling import named_solve_errors


class Predictive(numpyro.infer.Predictive):
    """NumPyro's `Predictive` for models with an `EmbeddingProcess`, with the same arguments.

    Where embeddings cannot be drawn, because det J <= 0 was met or no root was found, the call raises
    `ImplicitSolveError` with the status and its remedy, where NumPyro's own shows the traceback of a callback.
    """

    def __call__(self, rng_key: PRNGKeyArray, *args: Any, **kwargs: Any) -> dict[str, Array]:
        with named_solve_errors():
            return jax.block_until_ready(super().__call__(rng_key, *args, **kwargs))
