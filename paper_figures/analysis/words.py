"""Verdicts as sentences, made from their figures alone."""

from typing import Any

from paper_figures.analysis.verdicts import ALPHA

Entry = dict[str, Any]


def sentence(entry: Entry) -> str:
    """One finding of one method on one split, in plain words."""
    deciding = [c for c in entry["comparisons"] if c["decides"]]
    others = [c for c in entry["comparisons"] if not c["decides"]]
    head = f"{entry['method']} at {entry['strength']:g}, {entry['split']}: {entry['verdict']}."
    body = _ours(deciding) if entry["finding"] == "ours" else _one(entry["finding"], deciding[0])
    parts = [head, body]
    if entry["finding"] == "robustness":
        parts.append(_others(others, "Of the other perturbations"))
        parts.append(_rescaling(entry))
    elif others:
        parts += [_one(entry["finding"], other) for other in others]
    if entry["note"] and entry["note"] != deciding[0]["reason"]:
        parts.append(f"{entry['note'][0].upper()}{entry['note'][1:]}.")
    if not entry["within_budget"]:
        parts.append("Every strength of it costs more than the clean-loss budget; the cheapest was taken.")
    return " ".join(part for part in parts if part)


def _one(finding: str, comparison: dict[str, Any]) -> str:
    if comparison["mean_gain"] is None:
        return f"Not measurable: {comparison['reason']}."
    what = _effect(finding, comparison)
    holm = f"p {_p(comparison['p'])}; after Holm over {comparison['family_size']} {_p(comparison['p_holm'])}"
    return f"{what} ({_interval(finding, comparison)}; {holm}).{_because(finding, comparison)}"


def _effect(finding: str, comparison: dict[str, Any]) -> str:
    gain = comparison["mean_gain"]
    size = f"{abs(gain):.3f}" if _in_own_unit(comparison) else f"{abs(100 * gain):.1f} %"
    if finding == "clean":
        return (
            f"Clean loss is {abs(100 * gain):.2f} % {'lower' if gain > 0 else 'higher'} than {comparison['against']}'s"
        )
    if finding == "geometry":
        direction = {
            (True, True): "larger",
            (True, False): "smaller",
            (False, True): "smaller",
            (False, False): "larger",
        }
        way = direction[_in_own_unit(comparison), gain > 0]
        return f"The {comparison['measure']} is {size} {way} than {comparison['against']}'s"
    way = "less" if gain > 0 else "more"
    return f"Under {comparison['measure']} the loss rises {size} {way} than {comparison['against']}'s"


def _interval(finding: str, comparison: dict[str, Any]) -> str:
    """The change, not the gain: a loss that rises less is a negative change, as in every table."""
    if comparison["bootstrap_interval"] is None:
        return "one seed, so no interval"
    low, high = comparison["bootstrap_interval"]
    if _in_own_unit(comparison):
        return f"95 % of resampled seeds: {low:+z.3f} to {high:+z.3f}"
    digits = 2 if finding == "clean" else 1
    return f"95 % of resampled seeds: {-100 * high:+z.{digits}f} % to {-100 * low:+z.{digits}f} %"


def _in_own_unit(comparison: dict[str, Any]) -> bool:
    return "quantile of det J" in comparison["measure"]


def _because(finding: str, comparison: dict[str, Any]) -> str:
    smallest = comparison["smallest_effect"]
    shown = f"{smallest:g}" if _in_own_unit(comparison) else f"{100 * smallest:g} %"
    if comparison["verdict"] == "supported":
        return ""
    if comparison["verdict"] == "undecided":
        chance = f"{comparison['power']:.2f}, {comparison['power_in_family']:.2f} in its family"
        aim = f"no cost, with a limit of {shown}," if finding == "clean" else f"a gain of {shown}"
        return f" Undecided: the power to establish {aim} was {chance}."
    if finding == "clean":
        return f" A cost above {shown} is established."
    if comparison["mean_gain"] > 0 and comparison["p_holm"] < ALPHA:
        return f" The gain is real and smaller than the {shown} declared to matter."
    if comparison["equivalence_p"] < ALPHA:
        return f" It is equivalent to {comparison['against']} within {shown}."
    return f" A gain of {shown} or more is ruled out."


def _others(comparisons: list[dict[str, Any]], lead: str) -> str:
    groups: dict[str, list[str]] = {}
    for comparison in comparisons:
        gain = comparison["mean_gain"]
        change = "not measurable" if gain is None else f"{-100 * gain:+z.1f} %"
        groups.setdefault(comparison["verdict"], []).append(f"{comparison['measure']} ({change})")
    return f"{lead}: " + "; ".join(f"{verdict} for {', '.join(names)}" for verdict, names in groups.items()) + "."


def _ours(deciding: list[dict[str, Any]]) -> str:
    """Against every competitor, the change of the barrier's increase over it, as a share of that of ce."""
    words = {"supported": "better than", "not supported": "not better than", "undecided": "undecided against"}
    parts = []
    for verdict, word in words.items():
        names = [
            f"{c['against']} (not measurable)"
            if c["mean_gain"] is None
            else f"{c['against']} ({-100 * c['mean_gain']:+z.1f} %)"
            for c in deciding
            if c["verdict"] == verdict
        ]
        if names:
            parts.append(f"{word} {', '.join(names)}")
    unsure = [c["power_in_family"] for c in deciding if c["verdict"] == "undecided" and c["mean_gain"] is not None]
    power = ""
    if unsure:
        smallest = f"{100 * deciding[0]['smallest_effect']:g} %"
        power = (
            f" The power to establish a gain of {smallest} was at most {max(unsure):.2f} in the family where undecided."
        )
    return f"Under {deciding[0]['measure']}: {'; '.join(parts)}.{power}"


def wins_by_rescaling(entry: Entry) -> bool:
    """Whether noise of fixed size is met better, and noise relative to the embeddings is not."""
    verdicts = {c["measure"].rsplit(" ", 1)[0]: c["verdict"] for c in entry["comparisons"]}
    return verdicts.get("embedding-noise") == "supported" and verdicts.get("relative-embedding-noise") != "supported"


def _rescaling(entry: Entry) -> str:
    if not wins_by_rescaling(entry):
        return ""
    return (
        "It gains under noise of fixed size and not under noise relative to its embeddings: it wins by rescaling, which "
        "is no robustness."
    )


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"= {value:.2g}"
