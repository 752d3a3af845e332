import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy.special import softmax

from prob_transformer.inference.laplace import IndefiniteCurvatureError, laplace
from prob_transformer.inference.laplace.curvature import diagonal_of
from tests.helpers.modes import mode_at

RNG = np.random.default_rng(5)
X = RNG.normal(size=(5, 2))
LABELS = np.array([0, 1, 2, 1, 0])
SEEN = np.array([True, True, True, False, True])
MODE = {"s": np.array(0.3), "w": RNG.normal(size=(2, 3))}


def network(x, labels, seen):
    """Logits not linear in the parameters, a masked case, a scaled likelihood, a factor, and a positive site."""
    w = numpyro.sample("w", dist.Normal(0, 0.8).expand([2, 3]).to_event(2))
    s = numpyro.sample("s", dist.HalfNormal(1.5))
    numpyro.factor("penalty", -0.2 * (w**4).sum())
    with numpyro.plate("cases", x.shape[0]), numpyro.handlers.scale(scale=1.5):
        numpyro.sample("y", dist.Categorical(logits=s * jnp.tanh(x @ w)).mask(seen), obs=labels)


def logits(z, x=X):
    return jnp.exp(z[0]) * jnp.tanh(x @ z[1:].reshape(2, 3))


def rest(z):
    """Negative log density of prior, factor and transform up to a constant, by hand."""
    scale = 0.5 * jnp.exp(2 * z[0]) / 1.5**2 - z[0]
    return scale + 0.5 * (z[1:] ** 2).sum() / 0.8**2 + 0.2 * (z[1:] ** 4).sum()


def loss(f):
    return -1.5 * jnp.where(SEEN, jax.nn.log_softmax(f)[jnp.arange(5), LABELS], 0.0).sum()


@jax.jit
def by_hand(z):
    return jax.jacobian(logits)(z), jax.hessian(rest)(z), jax.hessian(lambda z: loss(logits(z)) + rest(z))(z)


def flat(mode):
    return jnp.concatenate([jnp.asarray(mode["s"])[None], jnp.asarray(mode["w"]).ravel()])


@pytest.fixture(scope="module")
def at():
    # Not a stationary point, which does not matter to the curvature.
    return mode_at(MODE, network, X, LABELS, SEEN)


@pytest.fixture(scope="module")
def truth():
    """The generalised Gauss-Newton matrix by hand: 1.5 J^T (diag p - p p^T) J over the cases seen, and the rest."""
    z = flat(MODE)
    jacobian, prior, hessian = map(np.asarray, by_hand(z))
    p = softmax(np.asarray(logits(z)), axis=-1)
    gauss_newton = prior.copy()
    for case in np.flatnonzero(SEEN):
        gauss_newton += 1.5 * jacobian[case].T @ (np.diag(p[case]) - np.outer(p[case], p[case])) @ jacobian[case]
    return {"ggn": gauss_newton, "hessian": hessian, "prior": prior}


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_both_curvatures_are_those_written_by_hand(at, truth, curvature):
    assert np.abs(truth["ggn"] - truth["hessian"]).max() > 0.05
    result = laplace(at, curvature=curvature)
    assert result.curvature == curvature
    np.testing.assert_allclose(result.precision.matrix(), truth[curvature], rtol=1e-9, atol=1e-12)


def test_the_diagonal_of_the_gauss_newton_matrix(at, truth):
    result = laplace(at, structure="diagonal", curvature="ggn")
    np.testing.assert_allclose(result.precision.diagonal, np.diag(truth["ggn"]), rtol=1e-10)


def test_a_low_rank_keeps_the_largest_eigenpairs_in_units_of_the_prior(at, truth):
    result = laplace(at, structure="low-rank", rank=2, curvature="ggn")
    root = np.sqrt(np.diag(truth["prior"]))
    values, vectors = np.linalg.eigh(truth["ggn"] / np.outer(root, root) - np.eye(7))
    scaled = np.eye(7) + (vectors[:, -2:] * values[-2:]) @ vectors[:, -2:].T
    np.testing.assert_allclose(result.covariance(), np.linalg.inv(scaled * np.outer(root, root)), atol=1e-9)


def test_sites_have_a_kronecker_product_each(at, truth):
    result = laplace(at, structure="kronecker", curvature="ggn")
    covariance = np.asarray(result.covariance())
    np.testing.assert_array_equal(covariance[0, 1:], 0.0)
    # A scalar is exact, and of a matrix the entries beside the prior are one product.
    np.testing.assert_allclose(covariance[0, 0], 1 / truth["ggn"][0, 0], rtol=1e-9)
    root = np.sqrt(np.diag(truth["prior"])[1:])
    product = np.linalg.inv(covariance[1:, 1:]) / np.outer(root, root) - np.eye(6)
    entries = product.reshape(2, 3, 2, 3).transpose(0, 2, 1, 3).reshape(4, 9)
    exact = (truth["ggn"][1:, 1:] / np.outer(root, root) - np.eye(6)).reshape(2, 3, 2, 3).transpose(0, 2, 1, 3)
    left, values, right = np.linalg.svd(exact.reshape(4, 9))
    np.testing.assert_allclose(entries, values[0] * np.outer(left[:, 0], right[0]), atol=1e-9)


def test_conjugate_gradients_give_the_covariance_whatever_the_structure(at, truth):
    v = RNG.normal(size=7)
    for structure, rank in [("diagonal", None), ("low-rank", 2)]:
        result = laplace(at, structure=structure, rank=rank, curvature="ggn")
        np.testing.assert_allclose(
            result.covariance_product(v, tolerance=1e-10), np.linalg.solve(truth["ggn"], v), atol=1e-8
        )


@pytest.mark.parametrize(
    ("v", "options", "message"),
    [
        (np.ones(7), {"tolerance": 1e-10, "max_steps": 1}, "tolerance: the relative residual is"),
        (np.ones(3), {}, r"v: has shape \(3,\); pass \(7,\)"),
        (np.zeros(7), {}, "not all 0"),
    ],
)
def test_conjugate_gradients_that_stop_early_are_refused(at, v, options, message):
    result = laplace(at, structure="diagonal", curvature="ggn")
    with pytest.raises(ValueError, match=message):
        result.covariance_product(v, **options)


def saddle(y):
    """Diagonal entries 3, off-diagonal 4: eigenvalues 7 and -1, which the diagonal cannot see."""
    w = numpyro.sample("w", dist.Normal(0, 1).expand([2]).to_event(1))
    numpyro.factor("coupling", -4 * w[0] * w[1] - (w**2).sum())
    numpyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def at_saddle(structure):
    return laplace(mode_at({"w": np.zeros(2)}, saddle, np.zeros(())), structure=structure)


def test_the_diagonal_of_a_saddle_can_be_positive():
    np.testing.assert_allclose(at_saddle("diagonal").precision.diagonal, [3.0, 3.0])


def spread(y):
    """A mean and its scale both unknown: in both together the loss is not convex."""
    m = numpyro.sample("m", dist.Normal(0, 1.0))
    t = numpyro.sample("t", dist.Normal(0, 1.0))
    numpyro.sample("y", dist.Normal(m, jnp.exp(t)), obs=y)


def test_a_loss_that_is_not_convex_in_its_outputs_is_refused():
    y = np.array(0.1)
    point = {"m": np.array(0.0), "t": np.array(-2.0)}
    scale = np.exp(-2.0)
    outer = np.array([[1 / scale**2, 2 * 0.1 / scale**3], [0, -1 / scale**2 + 3 * 0.1**2 / scale**4]])
    outer[1, 0] = outer[0, 1]
    jacobian = np.diag([1.0, scale])
    smallest = np.linalg.eigvalsh(jacobian.T @ outer @ jacobian + np.eye(2))[0]
    assert smallest < 0
    with pytest.raises(IndefiniteCurvatureError, match=f"smallest eigenvalue is {smallest:.4g}"[:-1]):
        laplace(mode_at(point, spread, y), curvature="ggn")


def test_a_diagonal_matrix_is_told_from_others_with_the_same_row_sums():
    z = jnp.ones(4)

    @eqx.filter_jit
    def diagonal(matrix):
        return diagonal_of(lambda v: matrix @ v, z)

    matrix = RNG.normal(size=(4, 4))
    np.testing.assert_allclose(diagonal(jnp.asarray(matrix + matrix.T)), 2 * np.diag(matrix), rtol=1e-14)
    np.testing.assert_allclose(diagonal(jnp.diag(z * 3.0)), 3.0 * np.ones(4))
    np.testing.assert_allclose(
        diagonal(jnp.diag(z) + jnp.diag(1e-9 * z[1:], 1) + jnp.diag(1e-9 * z[1:], -1)), 1.0, 1e-15
    )


def rooted(y):
    w = numpyro.sample("w", dist.Normal(0, 1.0))
    numpyro.factor("kink", -(jnp.abs(w) ** 1.5))
    numpyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        # Conjugate gradients meet the negative direction that the diagonal does not show.
        (
            lambda: at_saddle("diagonal").covariance_product(np.array([1.0, -1.0])),
            IndefiniteCurvatureError,
            r"v\^T P\^-1 v is -2",
        ),
        (lambda: at_saddle("full"), IndefiniteCurvatureError, "smallest eigenvalue is -1 "),
        (lambda: at_saddle("kronecker"), IndefiniteCurvatureError, "smallest eigenvalue at site 'w' is -1 "),
        (
            lambda: laplace(mode_at({"w": np.array(0.0)}, rooted, np.zeros(()))),
            ValueError,
            "curvature: is NaN or inf at the mode",
        ),
    ],
    ids=["conjugate gradients at a saddle", "full at a saddle", "kronecker at a saddle", "not finite"],
)
def test_a_curvature_that_is_not_positive_or_not_finite_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
