"""Memory of a fresh process: its own and nobody else's."""

import numpy as np
import pytest

from benchmarks.peak_memory import in_fresh_process, peak_of_this_process
from benchmarks.problem_sizes import QUICK


@pytest.mark.slow
def test_a_fresh_process_does_not_begin_with_the_peak_of_its_parent():
    ballast = np.ones(10**8)
    parent = peak_of_this_process()
    assert parent > 8 * ballast.size
    found = in_fresh_process({"kernel": 12}, QUICK)
    assert 5e7 < found["before"] < found["peak"] < parent
    # Queries, keys, their gradients and the mean, in float32; the rest is between them.
    outside = 4 * 4 * QUICK.heads * QUICK.head_size * 12 + 4
    assert outside < found["planned"] < found["peak"]


def test_work_that_fails_is_a_row_that_says_so():
    found = in_fresh_process({"step": "nonsense"}, QUICK)
    assert found == {"missing": "its process ended with status 1: KeyError: 'nonsense'"}
