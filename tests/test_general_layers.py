"""docs/general_layers.md: formulas against autodiff of the whole map, the pullback against autodiff of the formula."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

WIDTH, SIZE, PAST = 5, 4, 6
SCALE = SIZE**-0.5
CASES = list(itertools.product([None, 2.0], [False, True], [False, True]))


def rotation(angle, size):
    """A rotation of pairs of coordinates, each by a multiple of the angle of its own."""
    turned = np.zeros((size, size))
    for pair in range(size // 2):
        c, s = np.cos(angle / 10**pair), np.sin(angle / 10**pair)
        turned[2 * pair : 2 * pair + 2, 2 * pair : 2 * pair + 2] = [[c, -s], [s, c]]
    return turned


def norm(q, gain):
    return q if gain is None else gain * q / jnp.sqrt((q**2).mean() + 1e-6)


def cap_of(z, cap):
    return z if cap is None else cap * jnp.tanh(z / cap)


def layer(seed, rotary, normed):
    rng = np.random.default_rng(seed)
    weights = {name: rng.normal(size=(SIZE, WIDTH)) for name in ("query", "key")}
    gains = {name: rng.uniform(0.5, 1.5, SIZE) if normed else None for name in ("query", "key")}
    turns = [rotation(i if rotary else 0, SIZE) for i in range(PAST + 1)]
    value, bias = rng.normal(size=(WIDTH, WIDTH)), rng.normal(size=PAST + 1)
    return weights, gains, turns, value, bias, rng.normal(size=(PAST + 1, WIDTH))


def log_det_by_autodiff(made, cap, inclusive=False):
    """log|det(I - d mu / d u)| of the last position, from the attended mean as a function of its input."""
    weights, gains, turns, value, bias, inputs = made

    def mean(u):
        seen = jnp.concatenate([jnp.asarray(inputs[:-1]), u[None]]) if inclusive else jnp.asarray(inputs[:-1])
        turned_query = turns[PAST] @ norm(weights["query"] @ u, gains["query"])
        keys = jnp.stack([t @ norm(weights["key"] @ s, gains["key"]) for t, s in zip(turns, seen, strict=False)])
        logits = cap_of(SCALE * keys @ turned_query, cap) + bias[: len(seen)]
        return jax.nn.softmax(logits) @ (seen @ value.T)

    moved = jax.jacfwd(mean)(jnp.asarray(inputs[-1]))
    return np.asarray(moved), np.linalg.slogdet(np.eye(WIDTH) - moved)[1]


def parts_of(made, cap, inclusive=False):
    """q^, k~, bias, x and B of the page, and the past's values."""
    weights, gains, turns, value, bias, inputs = made
    seen = inputs if inclusive else inputs[:-1]
    query = weights["query"] @ inputs[-1]
    slope = np.asarray(jax.jacfwd(lambda q: norm(q, gains["query"]))(jnp.asarray(query)))
    keys = np.stack([t @ np.asarray(norm(weights["key"] @ s, gains["key"])) for t, s in zip(turns, seen, strict=False)])
    values = seen @ value.T
    return {
        "query": turns[PAST] @ np.asarray(norm(query, gains["query"])),
        "keys": keys,
        "bias": bias[: len(seen)],
        "features": values @ weights["query"].T,
        "b": turns[PAST] @ slope,
    }, values


def moments(parts, cap):
    """alpha, gamma, its slope, centred x and g, and C."""
    z = SCALE * parts["keys"] @ parts["query"]
    bent = jnp.tanh(z / cap) if cap else jnp.zeros_like(z)
    alpha = jax.nn.softmax((cap * bent if cap else z) + parts["bias"])
    gamma, slope = 1 - bent**2, (-2 * (1 - bent**2) * bent / cap if cap else jnp.zeros_like(z))
    g = gamma[:, None] * parts["keys"]
    x, g = parts["features"] - alpha @ parts["features"], g - alpha @ g
    return alpha, gamma, slope, x, g, x.T @ (alpha[:, None] * g)


def log_det(parts, cap):
    return jnp.linalg.slogdet(jnp.eye(SIZE) - SCALE * moments(parts, cap)[-1] @ parts["b"])[1]


def pullback(parts, cap):
    """The page's formulas, from phi = log|det J| to what a layer is made of."""
    alpha, gamma, slope, x, g, covariance = moments(parts, cap)
    inverse = np.linalg.inv(np.eye(SIZE) - SCALE * covariance @ parts["b"])
    pull = -SCALE * (parts["b"] @ inverse).T
    traces = np.einsum("sp,pq,sq->s", x, pull, g)
    np.testing.assert_allclose(alpha @ traces, (pull * covariance).sum(), atol=1e-12)
    of_g, of_logits = alpha[:, None] * (x @ pull), alpha * (traces - (pull * covariance).sum())
    of_z = gamma * of_logits + slope * (parts["keys"] * of_g).sum(1)
    return {
        "query": SCALE * of_z @ parts["keys"],
        "keys": gamma[:, None] * of_g + SCALE * np.outer(of_z, parts["query"]),
        "bias": of_logits,
        "features": alpha[:, None] * (g @ pull.T),
        "b": -SCALE * (inverse @ covariance).T,
    }


@pytest.mark.parametrize(("cap", "rotary", "normed"), CASES)
@pytest.mark.parametrize("seed", range(5))
def test_the_determinant_is_that_of_the_whole_map(seed, cap, rotary, normed):
    made = layer(seed, rotary, normed)
    np.testing.assert_allclose(log_det(parts_of(made, cap)[0], cap), log_det_by_autodiff(made, cap)[1], atol=1e-11)


@pytest.mark.parametrize(("cap", "rotary", "normed"), CASES)
@pytest.mark.parametrize("seed", range(3))
def test_the_pullback_is_that_of_autodiff(seed, cap, rotary, normed):
    parts, _ = parts_of(layer(seed, rotary, normed), cap)
    expected = jax.grad(log_det)(parts, cap)
    for name, found in pullback(parts, cap).items():
        np.testing.assert_allclose(found, expected[name], atol=1e-10 * max(1, np.abs(expected[name]).max()))


@pytest.mark.parametrize(("cap", "rotary", "normed"), CASES)
def test_heads_together_have_one_matrix_with_blocks_of_every_pair(cap, rotary, normed):
    heads = [layer(seed, rotary, normed)[:5] for seed in (1, 2)]
    inputs = layer(3, rotary, normed)[-1]
    moved = sum(log_det_by_autodiff((*head, inputs), cap)[0] for head in heads)
    blocks = np.zeros((2, SIZE, 2, SIZE))
    for h, head in enumerate(heads):
        parts, values = parts_of((*head, inputs), cap)
        for a, other in enumerate(heads):
            seen = parts | {"features": values @ other[0]["query"].T}
            blocks[a, :, h] = SCALE * moments(seen, cap)[-1] @ parts["b"]
    found = np.linalg.slogdet(np.eye(2 * SIZE) - blocks.reshape(2 * SIZE, 2 * SIZE))[1]
    np.testing.assert_allclose(found, np.linalg.slogdet(np.eye(WIDTH) - moved)[1], atol=1e-11)


@pytest.mark.parametrize(("cap", "rotary", "normed"), CASES)
def test_self_inclusion_adds_two_terms_and_is_not_the_same_formula(cap, rotary, normed):
    made = layer(4, rotary, normed)
    weights, gains, turns, value, _, inputs = made
    parts, values = parts_of(made, cap, inclusive=True)
    alpha, gamma, _, _, g, _ = moments(parts, cap)
    slope = np.asarray(jax.jacfwd(lambda k: norm(k, gains["key"]))(jnp.asarray(weights["key"] @ inputs[-1])))
    mean = alpha @ values
    moved = SCALE * (values - mean).T @ (alpha[:, None] * g) @ parts["b"] @ weights["query"]
    moved += alpha[-1] * value
    moved += (
        SCALE
        * alpha[-1]
        * gamma[-1]
        * np.outer(values[-1] - mean, weights["key"].T @ slope.T @ turns[PAST].T @ parts["query"])
    )
    expected, log_abs_det = log_det_by_autodiff(made, cap, inclusive=True)
    np.testing.assert_allclose(moved, expected, atol=1e-11)
    assert abs(log_det(parts, cap) - log_abs_det) > 1e-7
