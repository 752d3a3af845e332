"""A small text to train on."""

from pathlib import Path

import numpy as np


def write_words(path: Path, count: int = 600) -> Path:
    """A file of `count` words drawn from six, and its path."""
    words = np.random.default_rng(0).choice(["attention", "is", "a", "change", "of", "variables"], count)
    path.write_text(" ".join(words), encoding="utf-8")
    return path
