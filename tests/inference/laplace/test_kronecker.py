import jax.numpy as jnp
import numpy as np

from prob_transformer.inference.laplace.kronecker import nearest_kronecker

RNG = np.random.default_rng(4)
LEFT, RIGHT = RNG.normal(size=(2, 2)), RNG.normal(size=(3, 3))
LEFT, RIGHT = LEFT @ LEFT.T, RIGHT @ RIGHT.T


def test_the_nearest_kronecker_product_is_a_product_where_there_is_one():
    left, right = nearest_kronecker(jnp.asarray(np.kron(LEFT, RIGHT)), 2)
    np.testing.assert_allclose(np.kron(left, right), np.kron(LEFT, RIGHT), atol=1e-12)
    left, right = nearest_kronecker(jnp.asarray(np.kron(LEFT, -RIGHT)), 2)
    np.testing.assert_allclose(np.kron(left, right), np.kron(LEFT, -RIGHT), atol=1e-12)


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
