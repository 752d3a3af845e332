"""What an inspection shows and what its negative signs mean, in words that the table and the page share.

For the strict past, e_i is proper and has degree 1, so det J_i < 0 at one point u means that noise near e_i(u) has at
least three embeddings that it maps from, and |det J_i| N(e_i) integrates to more than 1 over u_i (theory section 3).
With the position itself included the first position has e = 0, that argument does not apply, and no density is claimed.
"""

import numpy as np
from jaxtyping import Float

from prob_transformer.inspection.text_margins import Setting


def map_in_words(setting: Setting) -> str:
    """The map whose determinants are shown, in two sentences."""
    values = "identity values (v = u)" if setting.values == "identity" else "the layer's own values (v = W_O W_V u)"
    past = "the past and the position itself" if setting.self_inclusive else "the strict past"
    return (
        f"Map analysed: e = u - mu(u) of one head at a time, at the layer's normalised inputs u, with {values}, mu "
        f"the attention mean over {past}. It is not the residual block u + mu(u) that the model computes."
    )


def density_reading(negative: Float[np.ndarray, "L H"], setting: Setting) -> str:
    """How often det J < 0 over layers and heads, and what that means for reading the layer as a density."""
    some = int((negative > 0).sum())
    counted = f"det J < 0 at {negative.mean():.2%} of all places after the first, in {some} of {negative.size} heads."
    if setting.self_inclusive:
        return (
            f"{counted} Positions attend to themselves here, as in the model: a diagnostic of the layer. "
            "No density is claimed: the first position has e = 0 whatever u, and the others may or may not have one."
        )
    if not some:
        return (
            f"{counted} Nothing past the boundary on this text; that is no proof that a head, read as a density, is "
            "normalised: the sign must be positive at every u, not only at those seen."
        )
    return (
        f"{counted} At each of them the head is past the boundary: several embeddings map to the same noise, and "
        "N(e) |det J| has a mass above 1 over u, so it is not a probability density there. Heads without negative "
        "signs may still have some elsewhere."
    )


def quoted(piece: str) -> str:
    """A token in quotes on one line; control characters and line breaks are written out."""
    return repr(piece) if piece else "(rest of a character)"
