"""The log joint of the transformer's model in plain NumPy: the truth that the library's model is compared with.

The equations are written out with loops over layers, heads and positions. Nothing but NumPy computes, so no mistake is
shared with the library. `weights` is a dict of arrays by site: "token_embedding", "position_embedding", "head",
"final_norm.scale", "blocks[0].query" and so on. Every function is analytic in its arrays and takes complex ones, so
the imaginary part of f(w + ihv) / h is the derivative of f in direction v (`directional_derivative`), without the
cancellation of finite differences. For the same reason maxima and signs are those of real parts.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Inexact, Int, Shaped

Weights = Mapping[str, Shaped[np.ndarray, "..."]]


def softmax(logits: Inexact[np.ndarray, "... m"]) -> Inexact[np.ndarray, "... m"]:
    """Weights (..., m) that sum to 1."""
    exponentials = np.exp(logits - logits.real.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def normalised(weights: Weights, name: str, x: Inexact[np.ndarray, "n d"]) -> Inexact[np.ndarray, "n d"]:
    """LayerNorm of x (n, d) with the scale and bias of the site."""
    centred = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centred * centred).mean(-1, keepdims=True) + 1e-5)
    return weights[f"{name}.scale"] * centred / deviation + weights[f"{name}.bias"]


def gelu(x: Inexact[np.ndarray, "*s"]) -> Inexact[np.ndarray, "*s"]:
    """GELU by its tanh approximation."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attention_weights(
    query: Inexact[np.ndarray, "p d"],
    key: Inexact[np.ndarray, "p d"],
    seen: Inexact[np.ndarray, "m d"],
    x: Inexact[np.ndarray, " d"],
) -> Inexact[np.ndarray, " m"]:
    """Weights alpha (m,) of the rows of seen (m, d) for the query of x (d,), one head of query and key (p, d)."""
    return softmax((seen @ key.T) @ (query @ x) / np.sqrt(len(query)))


def layer_names(weights: Weights) -> list[str]:
    """What the sites of every layer begin with, the first layer first."""
    return [f"blocks[{layer}]." for layer in range(sum(name.endswith("].query") for name in weights))]


def value_maps(weights: Weights, layer: str) -> Inexact[np.ndarray, "H d d"]:
    """V_h = W_O^h W_V^h (H, d, d) of a layer."""
    return np.stack([o @ v for o, v in zip(weights[f"{layer}output"], weights[f"{layer}value"], strict=True)])


def forward(
    weights: Weights, embeddings: Inexact[np.ndarray, "n d"]
) -> tuple[Inexact[np.ndarray, "n V"], list[Inexact[np.ndarray, "n d"]]]:
    """Logits (n, V) of input embeddings (n, d), and what every layer attends over, a list of arrays (n, d).

    Every position of the decoder attends to itself as well as to the past.
    """
    stream, inputs = embeddings, []
    for layer in layer_names(weights):
        x = normalised(weights, f"{layer}attention_norm", stream)
        inputs.append(x)
        attended = list(np.zeros_like(x))
        for query, key, value in zip(
            weights[f"{layer}query"], weights[f"{layer}key"], value_maps(weights, layer), strict=True
        ):
            for i in range(len(x)):
                attended[i] = attended[i] + value @ (attention_weights(query, key, x[: i + 1], x[i]) @ x[: i + 1])
        stream = stream + np.stack(attended)
        hidden = gelu(normalised(weights, f"{layer}mlp_norm", stream) @ weights[f"{layer}up"].T)
        stream = stream + hidden @ weights[f"{layer}down"].T
    return normalised(weights, "final_norm", stream) @ weights["head"].T, inputs


def residuals(
    query: Inexact[np.ndarray, "H p d"],
    key: Inexact[np.ndarray, "H p d"],
    value_map: Inexact[np.ndarray, "H d d"] | None,
    inputs: Inexact[np.ndarray, "n d"],
) -> Inexact[np.ndarray, "n d"]:
    """e_i = u_i - sum_h V_h sum_{s<i} alpha^h_is u_s (n, d) of inputs u (n, d); V_h is the identity for None."""
    rows = [inputs[0]]
    for i in range(1, len(inputs)):
        row = inputs[i]
        for h in range(len(query)):
            mean = attention_weights(query[h], key[h], inputs[:i], inputs[i]) @ inputs[:i]
            row = row - (mean if value_map is None else value_map[h] @ mean)
        rows.append(row)
    return np.stack(rows)


def jacobian_blocks(
    query: Inexact[np.ndarray, "H p d"],
    key: Inexact[np.ndarray, "H p d"],
    value_map: Inexact[np.ndarray, "H d d"] | None,
    inputs: Inexact[np.ndarray, "n d"],
) -> Inexact[np.ndarray, "n d d"]:
    """J_i = de_i/du_i = I - sum_h V_h Cov_{alpha^h_i}(u) W_K^hT W_Q^h / sqrt(p) of all positions, (n, d, d).

    The query and key are (H, p, d), the value maps (H, d, d) or None for the identity, the inputs (n, d). The past is
    strict, so J_1 = I.
    """
    blocks = [np.eye(inputs.shape[1])]
    for i in range(1, len(inputs)):
        past, block = inputs[:i], np.eye(inputs.shape[1])
        for h in range(len(query)):
            alpha = attention_weights(query[h], key[h], past, inputs[i])
            centred = past - alpha @ past
            slope = (centred.T @ (alpha[:, None] * centred)) @ key[h].T @ query[h] / np.sqrt(len(query[h]))
            block = block - (slope if value_map is None else value_map[h] @ slope)
        blocks.append(block)
    return np.stack(blocks)


def sign_and_log_det(
    blocks: Inexact[np.ndarray, "*s d d"],
) -> tuple[Float[np.ndarray, "*s"], Inexact[np.ndarray, "*s"]]:
    """Signs and logarithms of the absolute values of the determinants of blocks (..., d, d)."""
    determinant = np.linalg.det(blocks)
    sign = np.sign(determinant.real)
    return sign, np.log(sign * determinant)


def penalty(
    sign: Float[np.ndarray, "*s"],
    log_det: Inexact[np.ndarray, "*s"],
    form: str = "two-sided",
    threshold: float = 0.5,
    smallest: float = 2.0**-1074,
) -> Inexact[np.ndarray, "*s"]:
    """b = -log|det J|, or the one-sided penalty with K = log(threshold / smallest), in nats.

    With x = log(det J / threshold), the one-sided penalty is -x exp(1 / x) for x < 0, 0 from there on, and
    K (1 + log(1 + |det J| / threshold)) for det J <= 0. `smallest` is the smallest positive number of the dtype of
    the code that is compared, 2^-1074 for float64 and 2^-149 for float32.
    """
    assert form in ("two-sided", "one-sided"), form
    if form == "two-sided":
        return -log_det
    x = log_det - np.log(threshold)
    # From -1e-3 on exp(1 / x) is 0 in float64, and 1 / x would overflow.
    near = x.real < -1e-3
    inside = np.where(near, x, -1.0)
    before = np.where(near, -inside * np.exp(1 / inside), 0.0)
    return np.where(sign > 0, before, (np.log(threshold) - np.log(smallest)) * (1 + np.log1p(np.exp(x))))


def barrier_mean(
    weights: Weights,
    embeddings: Iterable[Inexact[np.ndarray, "n d"]],
    inputs: Iterable[Sequence[Inexact[np.ndarray, "n d"]]],
    site: str = "embedding",
    values: str = "identity",
    **form: Any,
) -> Any:
    """The mean penalty over sequences, positions, heads and layers, in nats; `form` goes on to `penalty`.

    At the site "embedding" the prior stage attends over embeddings (N, n, d). At "layers" each layer attends over its
    own inputs, N lists of one array (n, d) a layer: each head alone with identity values, or with values "own" all
    heads jointly with W_O W_V.
    """
    assert site in ("embedding", "layers"), site
    assert values in ("identity", "own"), values
    if site == "embedding":
        stage = weights["prior_stage.query"], weights["prior_stage.key"]
        blocks = [jacobian_blocks(*stage, None, u) for u in embeddings]
    else:
        blocks = []
        for sequence in inputs:
            for layer, x in zip(layer_names(weights), sequence, strict=True):
                query, key = weights[f"{layer}query"], weights[f"{layer}key"]
                if values == "own":
                    blocks.append(jacobian_blocks(query, key, value_maps(weights, layer), x))
                else:
                    blocks += [jacobian_blocks(q[None], k[None], None, x) for q, k in zip(query, key, strict=True)]
    return penalty(*sign_and_log_det(np.stack(blocks)), **form).mean()


def normal_log_density(x: Inexact[np.ndarray, "..."], mean: float, scale: float) -> Any:
    """The sum over all entries of x of log N(x; mean, scale^2), in nats."""
    return (-0.5 * ((x - mean) / scale) ** 2 - np.log(scale) - 0.5 * np.log(2 * np.pi)).sum()


def log_prior(weights: Weights, priors: Mapping[str, tuple[float, float]]) -> Any:
    """The log density of all weights, independent and normal with `priors[site]` = (mean, standard deviation)."""
    return sum(normal_log_density(value, *priors[name]) for name, value in weights.items())


def embed(weights: Weights, tokens: Int[np.ndarray, " n"]) -> Inexact[np.ndarray, "n d"]:
    """Input embeddings (n, d) of tokens (n,): token plus position."""
    return weights["token_embedding"][tokens] + weights["position_embedding"][: len(tokens)]


def emission_log_probability(
    weights: Weights, embeddings: Iterable[Inexact[np.ndarray, "n d"]], tokens: Int[np.ndarray, "N n"]
) -> Any:
    """The log probability of tokens (N, n), each under the logits at its position of embeddings (N, n, d)."""
    logits = np.concatenate([forward(weights, u)[0] for u in embeddings])
    return sum(np.log(softmax(row)[token]) for row, token in zip(logits, np.ravel(tokens), strict=True))


def log_likelihood(weights: Weights, tokens: Int[np.ndarray, "N m"]) -> Any:
    """The log probability of tokens[:, 1:] of (N, n + 1), each given those before; the first is given."""
    return emission_log_probability(weights, [embed(weights, row[:-1]) for row in tokens], tokens[:, 1:])


def process_log_density(
    query: Inexact[np.ndarray, "H p d"],
    key: Inexact[np.ndarray, "H p d"],
    embeddings: Inexact[np.ndarray, "n d"],
    noise_scale: float,
    first_scale: float,
    value_map: Inexact[np.ndarray, "H d d"] | None = None,
) -> Any:
    """log p(u_1..n) = sum_i log N(e_i; 0, scale_i^2 I) + log|det J_i| of embeddings (n, d) in nats.

    The value maps V_h are (H, d, d), or None for the identity.
    """
    noise = residuals(query, key, value_map, embeddings)
    first, others = normal_log_density(noise[0], 0, first_scale), normal_log_density(noise[1:], 0, noise_scale)
    return first + others + sign_and_log_det(jacobian_blocks(query, key, value_map, embeddings))[1].sum()


def log_joint(
    weights: Weights,
    tokens: Int[np.ndarray, "N m"],
    *,
    priors: Mapping[str, tuple[float, float]],
    latents: str = "table",
    attention: str = "free",
    embeddings: Iterable[Inexact[np.ndarray, "n d"]] = (),
    noise_scale: float = 1.0,
    first_scale: float = 1.0,
    barrier_weight: float = 0.0,
    **barrier: Any,
) -> Any:
    """The log joint of weights and tokens in nats, and of embeddings (N, n, d) where latents is "process".

    From a "table", tokens are (N, n + 1) and the first is given. With the "process", tokens are (N, n), each emitted
    from the logits of its position; the attention of the process is the prior stage's, "free", or "tied" to the first
    layer, all its heads jointly with W_O W_V. The barrier subtracts barrier_weight N n times `barrier_mean`, to which
    `barrier` goes on.
    """
    assert latents in ("table", "process"), latents
    assert attention in ("free", "tied"), attention
    total = log_prior(weights, priors)
    if latents == "table":
        embeddings, positions = [embed(weights, row[:-1]) for row in tokens], tokens[:, 1:].size
        total = total + log_likelihood(weights, tokens)
    else:
        stage, positions = "prior_stage." if attention == "free" else "blocks[0].", tokens.size
        query, key = weights[f"{stage}query"], weights[f"{stage}key"]
        values = None if attention == "free" else value_maps(weights, stage)
        for u in embeddings:
            total = total + process_log_density(query, key, u, noise_scale, first_scale, values)
        total = total + emission_log_probability(weights, embeddings, tokens)
    if barrier_weight == 0:
        return total
    inputs = [forward(weights, u)[1] for u in embeddings]
    return total - barrier_weight * positions * barrier_mean(weights, embeddings, inputs, **barrier)


def directional_derivative(
    function: Callable[[Weights], Any], weights: Weights, direction: Weights, step: float = 1e-30
) -> float:
    """d/dt function(weights + t direction) at t = 0 by the complex step; sites that direction lacks do not move."""
    assert direction.keys() <= weights.keys(), direction.keys() - weights.keys()
    moved = {name: value + 1j * step * direction.get(name, 0.0) for name, value in weights.items()}
    return float(function(moved).imag / step)
