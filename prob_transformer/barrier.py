"""The barrier prior: a log-barrier that pushes every position away from the degeneracy boundary det J_i = 0.

    b_i = -log|det J_i|

As a prior it is the improper prod_i |det J_i|^lambda. It is infinite at the boundary from both sides and not bounded
below: on either side of the wall it rewards growing |det J_i| without limit, so an objective that uses it alone
needs a weight prior (docs/theory.md section 5).
"""

from jaxtyping import Array, Float

from prob_transformer.attention import Attention
from prob_transformer.change_of_variables import residual_and_log_det


def barrier(attention: Attention, embeddings: Float[Array, "... n d"]) -> Float[Array, "... n"]:
    """b_i = -log|det J_i| in nats at every position; +inf on the boundary itself.

    Raises ValueError as `residual_and_log_det`. Source: theory section 4, second-hand for the per-position form.
    """
    return -residual_and_log_det(attention, embeddings).log_det
