"""Time and memory of the fast path against the length of a sequence."""

from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from paper_figures.figures.style import BLACK, BLUE, ORANGE

CAPTION = (
    "The blocked barrier, value and gradient, 4 cells (one sequence, 4 heads of size 32) in float32 on two CPU cores. Left: time of a call, median of "
    "paired rounds with the smallest and largest, and its slope of 2 (dashed, through the first point). Right: peak memory of "
    "a fresh process, interpreter, libraries and compilation included, and what the compiler plans for the arrays."
)


def draw(benchmark: dict[str, Any]) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.2))
    rows = benchmark["scaling"]["rows"]
    lengths = np.array([row["length"] for row in rows])
    times = [row["time"] for row in rows]
    median = np.array([time["median"] for time in times])
    bars = np.stack([median - [time["low"] for time in times], [time["high"] for time in times] - median])
    left.errorbar(lengths, median, yerr=bars, capsize=2, color=BLUE, marker="o", label="measured")
    square = median[0] * (lengths / lengths[0]) ** 2
    left.plot(lengths, square, color=BLACK, linestyle="--", linewidth=1.0, label="proportional to n^2")
    left.set_ylabel("time of value and gradient (s)")
    rows = benchmark["kernel-memory"]["rows"]
    lengths = np.array([row["length"] for row in rows])
    right.plot(lengths, [row["peak"] / 1e6 for row in rows], color=BLUE, marker="o", label="peak of the process")
    planned = [row["planned"] / 1e6 for row in rows]
    right.plot(lengths, planned, color=ORANGE, marker="s", linestyle="--", label="planned for arrays")
    right.set_ylabel("memory (MB)")
    for panel in (left, right):
        panel.set_xscale("log", base=2)
        panel.set(yscale="log", xlabel="length n (positions)")
        panel.set_xticks(lengths, [str(length) for length in lengths])
        panel.legend(frameon=False, loc="center left")
    return figure
