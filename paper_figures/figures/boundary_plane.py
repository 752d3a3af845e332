"""det J over the plane for d = 2: the degeneracy boundary and the support token of a short sequence."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from paper_figures.figures.style import BLACK, ORANGE
from prob_transformer import Attention, stability_margin, support_tokens
from prob_transformer.attention import Past, attention_weights
from prob_transformer.change_of_variables import residual_and_log_det_at

CAPTION = (
    "Determinant of J_i as a function of the embedding u_i, for d = 2 and a past of fixed tokens. Solid line: the "
    "degeneracy boundary det J_i = 0; hatched: det J_i < 0. Numbered circles: the past, area growing with the "
    "attention weight that the support token gives it. Star: the support token, the position of this "
    "sequence closest to the boundary by |det J_i|. Sequence drawn from a standard normal (seed 7), attention fixed by hand: an illustration."
)
SEED, LENGTH, WINDOW, GRID = 7, 8, 3.0, 241
INTERACTION = np.array([[2.2, 1.2], [-0.8, 1.8]])


def draw() -> Figure:
    embeddings = jnp.asarray(np.random.default_rng(SEED).normal(size=(LENGTH, 2)))
    # One head of size 2 with W_K = I, so that W_Q / sqrt(2) is the interaction.
    attention = Attention(jnp.asarray(np.sqrt(2) * INTERACTION)[None], jnp.eye(2)[None])
    position = int(support_tokens(attention, embeddings, 1).positions[0])
    past = Past.of(attention, embeddings[:position])
    axis = np.linspace(-WINDOW, WINDOW, GRID)
    plane = jnp.stack(jnp.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    found = jax.vmap(partial(residual_and_log_det_at, attention, past))(plane)
    determinant = np.asarray(found.sign * jnp.exp(found.log_det)).reshape(GRID, GRID)
    weights = np.asarray(attention_weights(attention, past, embeddings[position])[0])
    margin = float(stability_margin(attention, embeddings)[position])

    figure, axes = plt.subplots(figsize=(5.2, 4.2))
    levels = [-2, -1, -0.5, 0, 0.25, 0.5, 0.75, 1, 1.5]
    filled = axes.contourf(axis, axis, determinant, levels=levels, cmap="Greys_r", extend="both", alpha=0.75)
    axes.contourf(axis, axis, determinant, levels=[-1e9, 0], colors="none", hatches=["////"])
    boundary = axes.contour(axis, axis, determinant, levels=[0], colors=ORANGE, linewidths=2.2)
    for text in axes.clabel(boundary, fmt="det J = 0", fontsize=8):
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.8})
    axes.scatter(
        embeddings[:position, 0],
        embeddings[:position, 1],
        s=25 + 350 * weights,
        facecolor="white",
        edgecolor=BLACK,
        linewidth=1.2,
        label="past tokens (area: weight)",
        zorder=3,
    )
    for s, (x, y) in enumerate(np.asarray(embeddings[:position])):
        axes.annotate(str(s + 1), (x, y), ha="center", va="center", fontsize=6.5, zorder=4)
    axes.scatter(
        embeddings[position, 0],
        embeddings[position, 1],
        marker="*",
        s=190,
        facecolor=ORANGE,
        edgecolor=BLACK,
        label=f"support token i = {position + 1}, det J = {margin:.2f}",
        zorder=5,
    )
    axes.set(xlabel="first coordinate of u_i", ylabel="second coordinate of u_i", aspect="equal")
    axes.grid(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)
    figure.colorbar(filled, label="det J_i (dimensionless)")
    return figure
