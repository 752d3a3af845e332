"""The smallest model: d = 1, one head, identity values, one interaction a. Its density has a closed form.

    alpha_s proportional to exp(a u_s u_i),   mu_i = sum alpha_s u_s,   J_i = 1 - a Var_alpha(u)

Only a > 0 can reach the boundary a Var = 1. `python -m models.scalar` shows what the density does on both sides;
`python -m models.scalar infer --method METHOD` finds back what a dataset was drawn with (dataset, infer).
"""

from models.scalar.density import (
    NOISE_SCALE,
    PAST,
    conditional_masses,
    draw,
    scalar_attention,
    scalar_model,
)

__all__ = [
    "NOISE_SCALE",
    "PAST",
    "conditional_masses",
    "draw",
    "scalar_attention",
    "scalar_model",
]
