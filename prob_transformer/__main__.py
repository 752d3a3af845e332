"""The command `prob-transformer`, also `python -m prob_transformer`: see `prob-transformer inspect --help`.

What it needs beyond the library itself is in the extra `inspect`; without it the command says so in one line.
"""

import sys
from collections.abc import Sequence

_EXTRA = {"gguf", "msgspec", "rich", "safetensors", "tokenizers"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 2 for bad input or a missing package, 130 when interrupted."""
    try:
        from prob_transformer import inspect
        from prob_transformer.decoder_models.load import load
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA:
            raise
        print(f'error: {package} is not installed; pip install "prob-transformer[inspect]".', file=sys.stderr)
        return 2
    return inspect.main(sys.argv[1:] if argv is None else argv, load)


if __name__ == "__main__":
    sys.exit(main())
