"""What the correlations say, in words made by rule: nobody picks the words after seeing the figures.

A relation is said to be there when the interval that holds for all comparisons together leaves out 0; it is called weak
below 0.3, moderate below 0.5 and strong from there on, by absolute value.
"""

from models.behaviour.relation import Relation


def _there(found: Relation) -> bool:
    low, high = found.simultaneous
    return low > 0 or high < 0


def strength(correlation: float) -> str:
    size = abs(correlation)
    return "weak" if size < 0.3 else "moderate" if size < 0.5 else "strong"


def verdict(margin: str, outcome: str, plain: Relation, given: Relation, baseline: Relation) -> str:
    """One or two sentences on a margin and an outcome, next to the entropy baseline."""
    if not _there(plain):
        first = f"no relation between {margin!r} and {outcome!r} is shown ({plain.correlation:+.2f})"
    else:
        direction = "rises" if plain.correlation > 0 else "falls"
        first = f"{outcome!r} {direction} with {margin!r}: {strength(plain.correlation)} ({plain.correlation:+.2f})"
    if not _there(given):
        second = f"nothing is shown beyond attention entropy and position ({given.correlation:+.2f})"
    else:
        second = f"given attention entropy and position it is {strength(given.correlation)} ({given.correlation:+.2f})"
    against = "more" if abs(plain.correlation) > abs(baseline.correlation) else "less"
    return f"{first}; {second}; alone it orders tokens {against} than entropy does ({baseline.correlation:+.2f})."
