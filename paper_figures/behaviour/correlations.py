"""Rank correlations between figures of tokens, with bootstrap intervals over whole passages.

Tokens of a passage depend on one another, so passages are drawn again, not tokens. The correlation is Spearman's over
all tokens; the partial one is Pearson's of the ranks after what is linear in the ranks of the controls is taken out.
Each comes with its 95 % percentile interval, and with one that holds for all comparisons together (Bonferroni), which
the verdicts use: bootstrap standard error times Student's quantile for that many passages, for so far out in its tails
a bootstrap of a few thousand has too few draws.

Words are made by rule, so that nobody picks them after seeing the figures: a relation is said to be there when the
interval that holds for all comparisons together leaves out 0; it is called weak below 0.3, moderate below 0.5 and strong
from there on, by absolute value.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata
from scipy.stats import t as student

LEVEL = 0.95


class Relation(NamedTuple):
    """A correlation, its 95 % interval, and the interval that holds for all comparisons together."""

    correlation: float
    interval: tuple[float, float]
    simultaneous: tuple[float, float]

    @property
    def is_there(self) -> bool:
        """Whether the interval for all comparisons leaves out 0."""
        low, high = self.simultaneous
        return low > 0 or high < 0


def _standardised(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    centred = x - x.mean()
    size = np.linalg.norm(centred)
    return centred / size if size > 0 else centred


def partial_correlation(
    x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], controls: Sequence[Float[np.ndarray, " n"]] = ()
) -> float:
    """Spearman's correlation, given the controls if there are any; 0 where x or y does not vary beyond them."""
    x, y, *others = (_standardised(rankdata(values)) for values in (x, y, *controls))
    if others:
        basis = np.stack(others, 1)
        x, y = (_standardised(v - basis @ np.linalg.lstsq(basis, v, rcond=None)[0]) for v in (x, y))
    return float(x @ y)


def relate(
    passages: Sequence[Mapping[str, Float[np.ndarray, " m"]]],
    first: str,
    second: str,
    controls: Sequence[str],
    comparisons: int,
    resamples: int,
    seed: int,
) -> Relation:
    """Correlation of two figures over the tokens of all passages. Raises ValueError for fewer than two passages."""
    if len(passages) < 2:
        raise ValueError("--passages: an interval over passages needs at least 2; pass more.")
    names = (first, second, *controls)
    columns = [[passage[name] for name in names] for passage in passages]

    def of(chosen: Iterable[int]) -> float:
        x, y, *others = (np.concatenate(parts) for parts in zip(*(columns[i] for i in chosen), strict=True))
        return partial_correlation(x, y, others)

    rng = np.random.default_rng(seed)
    drawn = [of(rng.integers(len(passages), size=len(passages))) for _ in range(resamples)]

    missed = 1 - LEVEL
    low, high = np.quantile(drawn, [missed / 2, 1 - missed / 2])
    found = of(range(len(passages)))
    reach = float(np.std(drawn, ddof=1) * student.ppf(1 - missed / (2 * comparisons), len(passages) - 1))
    return Relation(found, (float(low), float(high)), (found - reach, found + reach))


def strength(correlation: float) -> str:
    size = abs(correlation)
    return "weak" if size < 0.3 else "moderate" if size < 0.5 else "strong"


def described(margin: str, outcome: str, plain: Relation, given: Relation, baseline: Relation) -> str:
    """One or two sentences on a margin and an outcome, next to the entropy baseline."""
    first = f"no relation between {margin!r} and {outcome!r} is shown ({plain.correlation:+.2f})"
    if plain.is_there:
        direction = "rises" if plain.correlation > 0 else "falls"
        first = f"{outcome!r} {direction} with {margin!r}: {strength(plain.correlation)} ({plain.correlation:+.2f})"
    second = f"nothing is shown beyond attention entropy and position ({given.correlation:+.2f})"
    if given.is_there:
        second = f"given attention entropy and position it is {strength(given.correlation)} ({given.correlation:+.2f})"
    against = "more" if abs(plain.correlation) > abs(baseline.correlation) else "less"
    return f"{first}; {second}; alone it orders tokens {against} than entropy does ({baseline.correlation:+.2f})."
