"""How every command begins and ends: enough threads for JAX, and one line and exit status 2 for bad input."""

import os
import sys
from collections.abc import Callable

from prob_transformer import ImplicitSolveError
from prob_transformer.files import replace_unencodable


def give_jax_threads() -> None:
    """Ask for more threads than cores in JAX's CPU pool; to be called before any computation, when JAX reads it.

    JAX 0.10 sizes the pool by the cores. With two of them a training step can end up waiting for itself: every thread
    of the pool idle, the step never ending (seen at batch 4, 8 and 12 on every run, not at 16, and not with JAX 0.12).
    """
    os.environ.setdefault("PJRT_NPROC", str(max(8, os.cpu_count() or 1)))


def run(main: Callable[[], int | None]) -> None:
    """Run a command's main function and exit with its status, 2 for bad input, 130 when interrupted."""
    give_jax_threads()
    replace_unencodable()
    try:
        sys.exit(main() or 0)
    except (ValueError, ImplicitSolveError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; finished parts are kept", file=sys.stderr)
        sys.exit(130)
