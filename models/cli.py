"""How every command begins and ends: enough threads for JAX, and one line and exit status 2 for bad input."""

import sys
from collections.abc import Callable

from models.workers import give_jax_threads
from prob_transformer import ImplicitSolveError
from prob_transformer.files import exit_status


def run(main: Callable[[], int | None]) -> None:
    """Run a command's main function and exit with its status, 2 for bad input, 130 when interrupted."""
    give_jax_threads()
    sys.exit(exit_status(main, ValueError, ImplicitSolveError, interrupted="finished parts are kept"))
