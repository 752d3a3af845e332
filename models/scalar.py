"""The smallest model: d = 1, one head, identity values, one interaction a. Everything here has a closed form.

    alpha_s proportional to exp(a u_s u_i),   mu_i = sum alpha_s u_s,   J_i = 1 - a Var_alpha(u)

Only a > 0 can reach the boundary a Var = 1. `python -m models.scalar` shows what the density does on both sides.
"""

import argparse
import math
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float, Int
from rich.console import Console
from rich.table import Table
from scipy.integrate import quad

from models import cli
from prob_transformer import Attention, LinearDecoder, token_model
from prob_transformer.attention import Past
from prob_transformer.change_of_variables import residual_and_log_det_at

# The example of docs/theory.md section 3.
PAST = (-1.0, 1.0, 0.3)
NOISE_SCALE = 0.5


def scalar_attention(a: Float[Array, ""] | float) -> Attention:
    """Attention on embeddings of width 1 whose interaction is a; raises ValueError unless a is finite."""
    strength = jnp.asarray(a, jnp.result_type(float))
    return Attention(strength.reshape(1, 1, 1), jnp.ones((1, 1, 1), strength.dtype))


def scalar_model(tokens: Int[Array, " n"] | None = None, length: int | None = None, vocabulary_size: int = 2) -> None:
    """NumPyro model over "a" ~ N(0, 1), "weight" ~ N(0, 1) of a linear decoder, embeddings and tokens (n,).

    a is not kept below the boundary: where the embeddings make det J <= 0 the joint is the |det J| density, whose mass
    is above 1 (docs/theory.md section 3). Raises ValueError as `token_model`.
    """
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    weight = numpyro.sample("weight", dist.Normal(0.0, 1.0).expand([vocabulary_size, 1]).to_event(2))
    decoder = LinearDecoder(weight, jnp.zeros(vocabulary_size, weight.dtype))
    token_model(scalar_attention(a), decoder, tokens, length=length, noise_scale=NOISE_SCALE)


def conditional_masses(a: float, past: tuple[float, ...] = PAST, noise_scale: float = NOISE_SCALE) -> dict[str, float]:
    """Of p(u given past): the mass with |det J|, the mass with its sign, and the smallest det J on the way."""
    attention = scalar_attention(a)
    cache = Past.of(attention, jnp.asarray(past)[:, None])

    @jax.jit
    def signed_density(u: Float[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        residual, sign, log_det = residual_and_log_det_at(attention, cache, u[None])
        determinant = sign * jnp.exp(log_det)
        return jnp.exp(-0.5 * jnp.square(residual[0] / noise_scale)) * determinant, determinant

    # The attended mean stays inside the past, so 12 standard deviations beyond it hold all the mass there is.
    reach = max(abs(value) for value in past) + 12 * noise_scale
    edges = np.linspace(-reach, reach, 65)
    norm = noise_scale * math.sqrt(2 * math.pi)

    def mass(absolute: bool) -> float:
        fold = abs if absolute else float
        return sum(quad(lambda u: fold(float(signed_density(u)[0])), lo, hi)[0] for lo, hi in pairwise(edges)) / norm

    determinants = jax.vmap(signed_density)(jnp.linspace(-reach, reach, 4001))[1]
    return {"absolute": mass(True), "signed": mass(False), "smallest_determinant": float(determinants.min())}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m models.scalar", description=__doc__.splitlines()[0])
    parser.add_argument("a", nargs="*", type=float, default=[-2.0, 0.5, 1.0, 1.5, 4.0], help="interactions to show")
    arguments = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)
    past = ", ".join(f"{value:g}" for value in PAST)
    table = Table(title=f"p(u_4 given past ({past})), noise scale {NOISE_SCALE:g}")
    for column in ("a", "smallest det J", "mass of |det J| density", "signed mass"):
        table.add_column(column, justify="right")
    for a in arguments.a:
        found = conditional_masses(a)
        figures = (found["smallest_determinant"], found["absolute"], found["signed"])
        table.add_row(f"{a:g}", *(f"{figure:.4f}" for figure in figures))
    Console().print(table)


if __name__ == "__main__":
    cli.run(main)
