"""Models whose linear maps are draws from the Gaussian that `python -m models.char_gpt laplace` left in a file."""

import json
from pathlib import Path

import jax.numpy as jnp

from models.char_gpt.linear_maps import with_matrices
from prob_transformer.inference.result_tree import load
from prob_transformer.transformer.network import Transformer


def drawn_models(path: Path, model: Transformer, checkpoint_sha256: str, draws: int) -> list[Transformer]:
    """The trained model `draws` times, each with its maps at one of the first draws in the file; other weights stay.

    The weights are those of the draws themselves, not a linearisation. Raises ValueError naming --posterior for a file
    that is missing, no result of `laplace`, or of other weights than the checkpoint's, and --draws for more draws than
    the file holds.
    """
    try:
        tree = load(path)
    except ValueError as error:
        raise ValueError(f"--posterior: {error}") from None
    if not {"laplace", "configuration"} <= tree.attrs.keys() or "posterior" not in tree.children:
        raise ValueError(f"--posterior: {path} is no result of laplace; pass a file that laplace wrote.")
    if json.loads(tree.attrs["configuration"]).get("checkpoint_sha256") != checkpoint_sha256:
        raise ValueError(
            f"--posterior: {path} is of other weights than the run's, which may have been extended; run laplace on it."
        )
    # One chain.
    drawn = {str(name): jnp.asarray(values.values[0]) for name, values in tree["posterior"].data_vars.items()}
    available = min(len(values) for values in drawn.values())
    if not 1 <= draws <= available:
        raise ValueError(f"--draws: got {draws}; pass 1 to {available}, the draws that {path} holds.")
    return [with_matrices(model, {name: values[i] for name, values in drawn.items()}) for i in range(draws)]
