import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.infer import Predictive
from numpyro.infer.util import log_density
from scipy.special import log_softmax
from scipy.stats import kstest, norm

from models import scalar
from models.scalar import __main__ as command
from prob_transformer import residual_and_log_det


def test_the_library_gives_the_scalar_closed_form():
    for a in (-2.0, 0.7, 3.0):
        embeddings = np.random.default_rng(0).normal(size=6)
        got = residual_and_log_det(scalar.scalar_attention(a), embeddings[:, None])
        for i in range(1, 6):
            weights = np.exp(a * embeddings[:i] * embeddings[i])
            weights /= weights.sum()
            mean = weights @ embeddings[:i]
            jacobian = 1 - a * (weights @ (embeddings[:i] - mean) ** 2)
            np.testing.assert_allclose(got.residual[i, 0], embeddings[i] - mean, atol=1e-13)
            np.testing.assert_allclose(got.sign[i] * np.exp(got.log_det[i]), jacobian, atol=1e-12)


def test_the_closed_form_jacobian_is_the_derivative_of_the_residual_by_finite_differences():
    past = np.array([-1.0, 1.0, 0.3])
    for a, u in ((-2.0, 0.4), (1.5, 0.1), (4.0, -0.2)):
        weights = np.exp(a * past * u) / np.exp(a * past * u).sum()
        np.testing.assert_allclose(scalar.scalar_weights(a, past, u), weights, rtol=1e-13)

        def residual(at, a=a):
            exponentials = np.exp(a * past * at)
            return at - exponentials @ past / exponentials.sum()

        slope = (residual(u + 1e-6) - residual(u - 1e-6)) / 2e-6
        np.testing.assert_allclose(scalar.scalar_jacobian(a, past, u), slope, atol=1e-8)


def test_draws_follow_the_process_and_say_where_it_is_no_law():
    embeddings, solved = scalar.draw(-1.0, jax.random.key(0), 64, length=6)
    assert solved == 1.0
    assert embeddings.shape == (64, 6)
    u = np.asarray(embeddings)[:, :3]
    alpha = np.exp(-u[:, :2] * u[:, 2:])
    alpha /= alpha.sum(1, keepdims=True)
    noise = np.stack([u[:, 1] - u[:, 0], u[:, 2] - (alpha * u[:, :2]).sum(1)]).ravel() / scalar.NOISE_SCALE
    assert kstest(noise, "norm").pvalue > 1e-3
    assert scalar.draw(8.0, jax.random.key(0), 64, length=6)[1] < 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_interaction_that_is_not_finite_is_named(bad):
    with pytest.raises(ValueError, match="a: contains NaN or inf"):
        scalar.scalar_attention(bad)


@pytest.mark.parametrize(("a", "mass"), [(-2.0, 1.0), (0.5, 1.0), (1.5, 1.0313), (4.0, 2.1239)])
def test_masses_on_both_sides_of_the_boundary(a, mass):
    found = scalar.conditional_masses(a)
    assert abs(found["signed"] - 1) < 1e-6
    assert abs(found["absolute"] - mass) < 5e-5
    assert (found["smallest_determinant"] > 0) == (mass == 1.0)


def test_the_models_log_joint_written_by_hand():
    tokens, embeddings = np.array([0, 1, 1]), np.array([[0.3], [-0.8], [1.1]])
    a, weight = 0.6, np.array([[0.4], [-1.2]])
    sites = {"a": jnp.asarray(a), "weight": jnp.asarray(weight), "embeddings": jnp.asarray(embeddings)}
    joint, _ = log_density(scalar.scalar_model, (jnp.asarray(tokens),), {}, sites)
    u = embeddings[:, 0]
    alpha = np.exp(a * u[:2] * u[2])
    alpha /= alpha.sum()
    mean = alpha @ u[:2]
    expected = norm.logpdf(a) + norm.logpdf(weight).sum()
    expected += norm.logpdf(u[0]) + norm.logpdf(u[1] - u[0], 0, 0.5) + norm.logpdf(u[2] - mean, 0, 0.5)
    expected += np.log(abs(1 - a * alpha @ (u[:2] - mean) ** 2))
    expected += log_softmax(embeddings @ weight.T, axis=1)[np.arange(3), tokens].sum()
    np.testing.assert_allclose(joint, expected, atol=1e-11)


def test_prior_draws_of_the_model_inside_the_safe_region():
    model = Predictive(scalar.scalar_model, posterior_samples={"a": -jnp.ones(3)})
    draws = model(jax.random.key(0), length=4)
    assert draws["embeddings"].shape == (3, 4, 1)
    assert set(np.unique(draws["tokens"])) <= {0, 1}


def test_integrals_that_miss_the_density_are_refused():
    # The signed mass is 1 for every a (docs/theory.md section 3).
    with pytest.raises(ValueError, match=r"a: got 100000; .* signed mass"):
        command.main(["100000", "--draws", "1"])


def test_the_command_prints_the_table(capsys):
    command.main(["1.5", "--draws", "4"])
    printed = capsys.readouterr().out
    assert "1.0313" in printed
    assert "1.0000" in printed
