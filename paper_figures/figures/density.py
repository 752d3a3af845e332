"""The 1-D density of one position before and past the degeneracy boundary, with its mass."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from scipy.stats import norm

from models.scalar import NOISE_SCALE, PAST, conditional_masses, scalar_attention
from paper_figures.figures.style import BLACK, BLUE, ORANGE, legend_below
from prob_transformer.attention import Past
from prob_transformer.change_of_variables import residual_and_log_det_at

INTERACTIONS = ((1.0, "before the boundary"), (1.5, "just past it"), (4.0, "far past it"))
CAPTION = (
    f"Conditional density of u_4 for d = 1, past {PAST} and noise scale {NOISE_SCALE:g}, for three interactions a. "
    "Solid: N(e) |det J|; dashed: N(e) alone, without the change of variables; hatched: det J < 0. Before the boundary "
    "the density integrates to 1; past it the mass is the expected number of roots and exceeds 1, while the signed "
    "mass stays 1."
)


def draw() -> Figure:
    axis = np.linspace(-2.6, 2.6, 801)
    figure, panels = plt.subplots(1, 3, figsize=(7.2, 3.0))
    for panel, (a, place) in zip(panels, INTERACTIONS, strict=True):
        attention = scalar_attention(a)
        past = Past.of(attention, jnp.asarray(PAST)[:, None])
        found = jax.vmap(partial(residual_and_log_det_at, attention, past))(jnp.asarray(axis)[:, None])
        noise_density = norm.pdf(np.asarray(found.residual)[:, 0], 0.0, NOISE_SCALE)
        density = noise_density * np.exp(np.asarray(found.log_det))
        masses = conditional_masses(a)
        panel.plot(axis, density, color=BLUE, label="N(e) |det J|")
        panel.plot(axis, noise_density, color=BLACK, linestyle="--", linewidth=1.0, label="N(e)")
        panel.fill_between(
            axis,
            0,
            density,
            where=np.asarray(found.sign) < 0,
            facecolor="none",
            edgecolor=ORANGE,
            hatch="////",
            linewidth=0,
            label="det J < 0",
        )
        panel.set(
            title=f"a = {a:g}, {place}\nmass {masses['absolute']:.4f}, signed {masses['signed']:.4f}",
            xlabel="embedding u_4 (units of u)",
            ylim=(0, 1.05 * max(density.max(), noise_density.max())),
        )
    panels[0].set_ylabel("density (1 / units of u)")
    legend_below(figure, panels[2], 3)
    return figure
