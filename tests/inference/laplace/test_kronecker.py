import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import hadamard

from prob_transformer.inference.laplace.kronecker import (
    combinations,
    kronecker_factors,
    nearest_kronecker,
    softmax_root,
)

KEY = jax.random.key(0)
RNG = np.random.default_rng(4)
LEFT, RIGHT = RNG.normal(size=(2, 2)), RNG.normal(size=(3, 3))
LEFT, RIGHT = LEFT @ LEFT.T, RIGHT @ RIGHT.T


def softmax_hessian(logits):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return np.einsum("nv,vw->nvw", p, np.eye(p.shape[-1])) - np.einsum("nv,nw->nvw", p, p)


def gauss_newton(logits_of, matrix, hessian):
    """sum_t J_t^T H_t J_t over all positions, by autodiff, for one matrix by rows."""
    jacobian = np.asarray(jax.jacobian(logits_of)(matrix)).reshape(*hessian.shape[:-1], -1)
    return np.einsum("nvk,nvw,nwl->kl", jacobian, hessian, jacobian)


def head(hook, weight, features):
    return hook("head", features, features @ weight.T)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 2e-5)])
def test_factors_are_exact_for_a_softmax_layer_of_one_example_and_position(dtype, tolerance):
    rng = np.random.default_rng(0)
    weight, features = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((4, 3), (1, 1, 3)))
    found = kronecker_factors(head, weight, features, combinations("apart", KEY, 1, 1))["head"]
    truth = gauss_newton(lambda w: features[0] @ w.T, weight, softmax_hessian(np.asarray(features[0] @ weight.T)))
    assert found.output.dtype == dtype
    np.testing.assert_allclose(np.kron(found.output, found.input), truth, rtol=0, atol=tolerance)


def deep(hook, weights, features):
    first, second, third = weights
    hidden = hook("first", features, features @ first.T)
    hidden = hook("second", hidden, hidden @ second.T)
    return hook("third", hidden, hidden @ third.T)


def test_factors_are_exact_for_a_deep_linear_network_with_gaussian_loss_and_one_example():
    rng = np.random.default_rng(1)
    weights = [jnp.asarray(rng.normal(size=shape)) for shape in ((3, 2), (4, 3), (2, 4))]
    features = jnp.asarray(rng.normal(size=(1, 1, 2)))
    found = kronecker_factors(deep, weights, features, combinations("apart", KEY, 1, 1), lambda f: jnp.eye(2)[None])
    for index, name in enumerate(("first", "second", "third")):

        def logits_of(weight, index=index):
            replaced = [*weights[:index], weight, *weights[index + 1 :]]
            return deep(lambda _, inputs, outputs: outputs, replaced, features[0])

        truth = gauss_newton(logits_of, weights[index], np.eye(2)[None])
        np.testing.assert_allclose(np.kron(found[name].output, found[name].input), truth, rtol=1e-12)


def mixing(hook, weights, features):
    """Every position averages those before it, between two maps."""
    hidden = jnp.tanh(hook("first", features, features @ weights[0].T))
    length = len(features)
    averages = jnp.tril(jnp.ones((length, length))) / jnp.arange(1, length + 1)[:, None] @ hidden
    return hook("head", averages, averages @ weights[1].T)


def mixing_case(examples=3, length=4):
    rng = np.random.default_rng(2)
    weights = [jnp.asarray(rng.normal(size=shape)) for shape in ((3, 2), (5, 3))]
    return weights, jnp.asarray(rng.normal(size=(examples, length, 2)))


def factors_by_hand(weights, features):
    """B and A of "first" by autodiff of the logits in its outputs at every position."""
    output, inputs = 0.0, []
    for example in features:
        hidden = example @ weights[0].T

        def logits_of(outputs, example=example):
            return mixing(lambda name, _, y: outputs if name == "first" else y, weights, example)

        jacobian = np.asarray(jax.jacobian(logits_of)(hidden))
        hessian = softmax_hessian(np.asarray(logits_of(hidden)))
        output = output + np.einsum("tvsi,tvw,twsj->ij", jacobian, hessian, jacobian)
        inputs.append(np.asarray(example))
    stacked = np.concatenate(inputs)
    return output, stacked.T @ stacked / len(stacked)


def test_shared_weights_sum_outputs_and_average_inputs():
    weights, features = mixing_case()
    found = kronecker_factors(mixing, weights, features, combinations("apart", KEY, 3, 4))["first"]
    output, inputs = factors_by_hand(weights, features)
    np.testing.assert_allclose(found.output, output, rtol=1e-12)
    np.testing.assert_allclose(found.input, inputs, rtol=1e-12)


def test_random_signs_are_exact_on_average():
    weights, features = mixing_case()
    output, _ = factors_by_hand(weights, features)
    # The rows of a Hadamard matrix are orthogonal signs: E^T E = I once divided by their number.
    rows = jnp.broadcast_to(jnp.asarray(hadamard(4) / 2.0), (3, 4, 4))
    np.testing.assert_allclose(kronecker_factors(mixing, weights, features, rows)["first"].output, output, rtol=1e-12)
    rows = combinations("signs", KEY, 3000, 4)
    np.testing.assert_array_equal(np.abs(rows), np.ones((3000, 1, 4)))
    np.testing.assert_allclose(np.einsum("wrs,wrt->st", rows, rows) / 3000, np.eye(4), atol=5 / np.sqrt(3000))


def test_positions_together_add_products_of_different_positions():
    """Two positions, f_1 = h_1 and f_2 = h_1 + h_2 with weights 0, so that H_1 = H_2 = H: apart 3 H, together 5 H."""

    def sums(hook, weight, features):
        return jnp.cumsum(hook("map", features, features @ weight.T), axis=0)

    hessian = np.array([[0.25, -0.25], [-0.25, 0.25]])
    features = jnp.ones((1, 2, 1))
    for positions, factor in (("apart", 3), ("together", 5)):
        found = kronecker_factors(sums, jnp.zeros((2, 1)), features, combinations(positions, KEY, 1, 2))["map"]
        np.testing.assert_allclose(found.output, factor * hessian, atol=1e-6)


def test_without_mixing_it_does_not_matter_how_positions_are_combined():
    weights, features = mixing_case()
    heads = [
        kronecker_factors(mixing, weights, features, combinations(positions, KEY, 3, 4))["head"].output
        for positions in ("apart", "signs", "together")
    ]
    np.testing.assert_allclose(heads[1:], [heads[0]] * 2, rtol=1e-12)


def test_the_root_of_the_softmax_hessian():
    logits = np.random.default_rng(3).normal(size=(2, 5))
    root = np.asarray(softmax_root(jnp.asarray(logits)))
    np.testing.assert_allclose(root @ root.swapaxes(1, 2), softmax_hessian(logits), atol=1e-14)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda hook, w, x: x @ w.T, "network: calls its hook at no linear map"),
        (lambda hook, w, x: hook("a", x, hook("a", x, x @ w.T)), "network: calls its hook under 'a' twice"),
        (lambda hook, w, x: hook("a", x[0], x @ w.T), "network: calls its hook under 'a' with inputs"),
    ],
)
def test_networks_that_are_not_hooked_well_are_refused(network, message):
    with pytest.raises(ValueError, match=message):
        kronecker_factors(network, jnp.ones((2, 3)), jnp.ones((1, 2, 3)), combinations("apart", KEY, 1, 2))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("all", KEY, 1, 1), "positions: got 'all'; pass one of apart, signs, together"),
        (("signs", KEY, 0, 1), "examples: got 0"),
        (("signs", KEY, 1, 0), "length: got 0"),
    ],
)
def test_unknown_combinations_and_no_examples_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        combinations(*given)


def test_the_nearest_kronecker_product_is_a_product_where_there_is_one():
    for product in (np.kron(LEFT, RIGHT), np.kron(LEFT, -RIGHT)):
        np.testing.assert_allclose(np.kron(*nearest_kronecker(jnp.asarray(product), 2)), product, atol=1e-12)


def test_only_symmetric_factors_are_looked_for():
    # A product of antisymmetric matrices is symmetric, but none of symmetric ones comes nearer to it than 0.
    turn, spin = np.array([[0.0, 1.0], [-1.0, 0.0]]), np.array([[0.0, 1.0, 2.0], [-1.0, 0.0, 3.0], [-2.0, -3.0, 0.0]])
    left, right = nearest_kronecker(jnp.asarray(np.kron(LEFT, RIGHT) + 50 * np.kron(turn, spin)), 2)
    np.testing.assert_allclose(np.kron(left, right), np.kron(LEFT, RIGHT), atol=1e-10)


def test_no_other_kronecker_product_is_nearer():
    block = RNG.normal(size=(6, 6))
    block = block @ block.T
    left, right = map(np.asarray, nearest_kronecker(jnp.asarray(block), 2))
    nearest = np.linalg.norm(block - np.kron(left, right))
    # Alternating least squares from many starts: each factor is optimal given the other.
    blocks = block.reshape(2, 3, 2, 3)
    for _ in range(20):
        other = RNG.normal(size=(3, 3))
        for _ in range(200):
            own = np.einsum("ipjq,pq->ij", blocks, other) / (other**2).sum()
            other = np.einsum("ipjq,ij->pq", blocks, own) / (own**2).sum()
        assert nearest <= np.linalg.norm(block - np.kron(own, other)) + 1e-9
    assert nearest >= 1e-3
