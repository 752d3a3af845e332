"""How every command ends: bad input and what cannot be drawn become one line on standard error and exit status 2."""

import sys
from collections.abc import Callable

from prob_transformer import ImplicitSolveError
from prob_transformer.files import replace_unencodable


def run(main: Callable[[], int | None]) -> None:
    """Run a command's main function and exit with its status, 2 for bad input, 130 when interrupted."""
    replace_unencodable()
    try:
        status = main()
    except (ValueError, ImplicitSolveError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; finished parts are kept", file=sys.stderr)
        sys.exit(130)
    sys.exit(status or 0)
