"""What every command prints to: a stream that shows what it can."""

import io
import sys


def replace_unencodable() -> None:
    """Makes standard output write "?" for a character that its encoding lacks: no finished run ends in an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
