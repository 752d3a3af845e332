"""The command `prob-transformer`, also `python -m prob_transformer`: see `prob-transformer --help`.

Its --help and --version work with the core alone. What the commands need beyond it is in the extra `inspect`.
"""

import sys

from prob_transformer.inspection.command import main

if __name__ == "__main__":
    sys.exit(main())
