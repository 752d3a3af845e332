"""Methods times seeds, one folder a run: finished runs are kept, a killed one goes on from its checkpoint."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from models.char_gpt.config import Config, Objective, Site
from models.char_gpt.run import run
from models.corpus import Corpus
from prob_transformer.provenance import provenance, write_json


class Method(NamedTuple):
    """An objective with the site and weight of its barrier."""

    objective: Objective
    site: Site
    weight: float


# 0.05 is the upper end of the weights reported second-hand (docs/theory.md section 7); none was tuned here.
METHODS = (
    Method("ce", "embedding", 0.0),
    Method("margin", "embedding", 0.05),
    Method("margin", "layers", 0.05),
    Method("map", "embedding", 0.05),
    Method("map", "layers", 0.05),
)


class Profile(NamedTuple):
    """How large a sweep is: seeds, and the configuration all its runs share."""

    seeds: tuple[int, ...]
    base: Config


PROFILES = {
    "smoke": Profile((0,), Config(steps=20, width=16, heads=2, context=16, batch=4, evaluation_windows=16)),
    "quick": Profile((0, 1, 2), Config(steps=200, batch=8)),
    "full": Profile(
        (0, 1, 2, 3, 4),
        Config(steps=3000, layers=4, width=128, context=128, evaluation_windows=1024, path="accelerated"),
    ),
}


def configurations(profile: Profile) -> list[Config]:
    """Every run of a profile: methods in order, seeds within a method."""
    return [
        dataclasses.replace(
            profile.base,
            objective=method.objective,
            barrier_site=method.site,
            barrier_weight=method.weight,
            seed=seed,
        )
        for method in METHODS
        for seed in profile.seeds
    ]


def run_name(config: Config) -> str:
    return f"{config.method}-weight{config.barrier_weight:g}-seed{config.seed}"


def sweep(profile_name: str, corpus: Corpus, out: Path, console: Console) -> list[dict[str, Any]]:
    """Run or finish every run of a profile under `out`, write summary.json and print a table; return the metrics.

    Raises ValueError for an unknown profile or an unwritable folder.
    """
    if profile_name not in PROFILES:
        raise ValueError(f"--profile: got {profile_name!r}; pass one of {', '.join(PROFILES)}.")
    profile = PROFILES[profile_name]
    record = provenance(None, {"profile": profile_name, "seeds": list(profile.seeds), **profile.base.as_dict()})
    results = []
    chosen = configurations(profile)
    for number, config in enumerate(chosen, start=1):
        console.print(f"run {number} of {len(chosen)}: {run_name(config)}")
        metrics = run(config, corpus, out / run_name(config))
        results.append({"run": run_name(config), **{k: v for k, v in metrics.items() if k != "training"}})
    write_json(out / "summary.json", {"provenance": record, "profile": profile_name, "runs": results})
    console.print(table(results))
    return results


def table(results: list[dict[str, Any]]) -> Table:
    """Mean over seeds of the figures a reader looks for first."""
    columns = ("method", "weight", "seeds", "clean loss", "increase at 1.0 RMS", "det J <= 0 in layers", "s / step")
    shown = Table(title="validation loss in nats per character, mean over seeds")
    for column in columns:
        shown.add_column(column, no_wrap=column == "method")
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for result in results:
        key = (result["method"], result["provenance"]["configuration"]["barrier_weight"])
        groups.setdefault(key, []).append(result)
    for (method, weight), members in groups.items():

        def mean(values: list[float]) -> float:
            return sum(values) / len(values)

        noisy = [
            row["increase"] for m in members for row in m["noise"] if (row["kind"], row["sigma"]) == ("relative", 1.0)
        ]
        shown.add_row(
            method,
            f"{weight:g}",
            str(len(members)),
            f"{mean([m['clean_loss']['nats_per_character'] for m in members]):.4f}",
            f"{mean(noisy):+.4f}",
            f"{mean([m['margins']['layers']['negative_share'] for m in members]):.2%}",
            f"{mean([m['seconds_per_step'] for m in members]):.3f}",
        )
    return shown
