"""The command `prob-transformer`, also `python -m prob_transformer`: see `prob-transformer inspect --help`.

Its --help and --version work with the core alone. What `inspect` needs beyond it is in the extra `inspect`.
"""

import sys
from collections.abc import Sequence

from prob_transformer import inspection


def _load(model: str) -> inspection.Loaded:
    # The loaders need the extra, which --help must not.
    from prob_transformer.pretrained.load import load

    return load(model)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 2 for bad input or a missing extra, 130 when interrupted."""
    return inspection.main(sys.argv[1:] if argv is None else argv, _load)


if __name__ == "__main__":
    sys.exit(main())
