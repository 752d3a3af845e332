"""`python -m models.scalar [A ...]`, and `python -m models.scalar infer --method METHOD`."""

import argparse
import sys

import jax
from rich.console import Console
from rich.table import Table

from models import cli
from models.scalar import infer
from models.scalar.density import NOISE_SCALE, PAST, conditional_masses, draw
from prob_transformer._validation import require_count, require_seed

# Four digits are shown.
_SIGNED_MASS_ERROR = 1e-4


def _show_density(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m models.scalar",
        description="The density of the smallest model before and past the boundary.",
        epilog="To find parameters or embeddings from data instead: python -m models.scalar infer --help",
    )
    parser.add_argument("a", nargs="*", type=float, default=[-2.0, 0.5, 1.0, 1.5, 4.0], help="interactions to show")
    parser.add_argument("--draws", type=int, default=200, help="sequences to sample (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default: %(default)s)")
    arguments = parser.parse_args(argv)
    require_seed("--seed", arguments.seed, "the draws")
    require_count("--draws", arguments.draws, 1, "the number of sequences")
    past = ", ".join(f"{value:g}" for value in PAST)
    table = Table(title=f"p(u_4 given past ({past})), noise scale {NOISE_SCALE:g}")
    for column in ("a", "smallest det J", "mass of |det J| density", "signed mass", "drawn, det J > 0 throughout"):
        table.add_column(column, justify="right")
    for a in arguments.a:
        found = conditional_masses(a)
        if not abs(found["signed"] - 1) < _SIGNED_MASS_ERROR:
            raise ValueError(
                f"a: got {a:g}; pass a smaller number: the signed mass, which is 1 for every a, came out as "
                f"{found['signed']:.4g}, so the integrals are not resolved."
            )
        solved = draw(jax.random.key(arguments.seed), a, arguments.draws)[1]
        figures = (f"{found[name]:.4f}" for name in ("smallest_determinant", "absolute", "signed"))
        table.add_row(f"{a:g}", *figures, f"{solved:.1%}")
    Console().print(table)


def main(argv: list[str] | None = None) -> int:
    jax.config.update("jax_enable_x64", True)
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["infer"]:
        return infer.main(argv[1:])
    _show_density(argv)
    return 0


if __name__ == "__main__":
    cli.run(main)
