import numpy as np

from prob_transformer.inspection.summary import QUANTILES, summary


def test_figures_leave_the_first_position_out(made_up):
    found = summary(made_up)
    np.testing.assert_array_equal(found.negative, [[3 / 4], [0]])
    # - - + -, and + 0 + +
    np.testing.assert_array_equal(found.crossings, [[2], [2]])
    np.testing.assert_array_equal(found.closest, [[2], [2]])
    # Barriers 1 4 -2 3 and -0.5 inf -1.5 -800: the smallest of which at most half are smaller, and so on.
    assert QUANTILES == (0.05, 0.5, 0.95)
    np.testing.assert_array_equal(found.quantiles, [[[-2, 1, 4]], [[-800, -1.5, np.inf]]])
