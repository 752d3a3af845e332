import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.infer
import pytest

from models.scalar.density import scalar_attention
from prob_transformer import EmbeddingProcess, ImplicitSolveError, SolveStatus, named_solve_errors
from prob_transformer.inference import Predictive


def embeddings(a):
    numpyro.sample("embeddings", EmbeddingProcess(scalar_attention(a), 6, 0.5))


@pytest.mark.parametrize("parallel", [False, True])
def test_past_the_boundary_the_first_line_names_status_and_remedy(parallel):
    with pytest.raises(ImplicitSolveError) as info:
        Predictive(embeddings, num_samples=20, parallel=parallel)(jax.random.key(0), 8.0)
    first = str(info.value).splitlines()[0]
    assert first.startswith(f"{info.value.status.name.lower()}: ")
    assert info.value.status in (SolveStatus.PAST_BOUNDARY, SolveStatus.NOT_CONVERGED)
    assert "scale query or key down" in first


def test_before_it_the_draws_are_those_of_numpyro():
    ours, theirs = (kind(embeddings, num_samples=4) for kind in (Predictive, numpyro.infer.Predictive))
    found, expected = ours(jax.random.key(1), -1.0), theirs(jax.random.key(1), -1.0)
    np.testing.assert_array_equal(found["embeddings"], expected["embeddings"])


def test_other_errors_are_left_as_they_are():
    def callback(x):
        raise RuntimeError("of another kind")

    with pytest.raises(RuntimeError, match="of another kind") as info, named_solve_errors():
        jax.block_until_ready(jax.jit(lambda x: jax.pure_callback(callback, x, x))(jnp.ones(())))
    assert not isinstance(info.value, ImplicitSolveError)
