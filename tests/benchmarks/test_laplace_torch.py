# For the merge of h-checks: tests/benchmarks/test_laplace_torch.py from `import equinox` on, against the new stack.
import jax.numpy as jnp
import numpy as np
import pytest

from models.char_gpt.linear_maps import trained_network
from prob_transformer.inference.laplace import laplace

# ... in `given`: model = with_matrices(model, {name: jnp.asarray(arrays[name]) for name in matrices(model)})


@pytest.mark.parametrize("structure", ["last-layer", pytest.param("kronecker", marks=pytest.mark.slow)])
def test_evidence_and_predictive_loss_are_those_of_laplace_torch(given, structure):
    model, training, validation = given
    found = laplace(trained_network(model, training), structure=structure, positions="together", prior_precision=TAU)
    theirs = RESULT["structures"][structure]
    for name, part in found.evidence._asdict().items():
        np.testing.assert_allclose(part, theirs["log_evidence"]["theirs"][name], rtol=1e-5)
    probabilities = found.probit_probabilities(jnp.asarray(validation[:, :-1]))
    seen = np.take_along_axis(probabilities, validation[:, 1:, None], -1)
    np.testing.assert_allclose(-np.log(seen).mean(), theirs["predictive_loss"]["theirs"], rtol=1e-6)


@pytest.mark.slow
def test_positions_apart_change_the_evidence_as_they_did(given):
    model, training, _ = given
    found = laplace(trained_network(model, training), structure="kronecker", positions="apart", prior_precision=TAU)
    assert found.log_evidence == pytest.approx(RESULT["positions"]["kronecker_log_evidence"]["apart"], rel=1e-6)
