"""Methods times strengths times seeds, one line a run in DIR/runs.jsonl; killed, it goes on where it was."""

import fcntl
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from models.char_gpt import lines, workers
from models.char_gpt.config import Config
from models.char_gpt.study import PROFILES, configurations, run_name
from models.corpus import Corpus

UNFINISHED = "unfinished"
# Seconds of a run over those of plain cross-entropy, measured on one core at the size of the full profile; for the
# time left alone, which would be far off while the cheap methods of a seed come first.
_COST = {"margin@layers": 2.2, "one-sided@layers": 3.0, "map@layers": 4.0, "jacobian": 3.7}


def sweep(
    profile_name: str, text: Path | None, corpus: Corpus, out: Path, console: Console, worker_count: int | None = None
) -> list[dict[str, Any]]:
    """Run or finish every run of a profile, one line each in `out`/runs.jsonl, print a table and return the lines.

    Raises ValueError for an unknown profile, an unwritable folder, one that holds other runs, or one in use.
    """
    if profile_name not in PROFILES:
        raise ValueError(f"--profile: got {profile_name!r}; pass one of {', '.join(PROFILES)}.")
    worker_count = workers.default_workers() if worker_count is None else worker_count
    if worker_count < 1:
        raise ValueError(f"--workers: got {worker_count}; pass an integer of at least 1.")
    profile = PROFILES[profile_name]
    chosen = {run_name(config): config for config in configurations(profile)}
    command = shlex.join(["python", *sys.orig_argv[1:]])
    path, folder = out / lines.NAME, out / UNFINISHED
    with _alone_in(out):
        lines.drop_torn_end(path)
        found = _finished(path, chosen, corpus)
        left = [config for name, config in chosen.items() if name not in found]
        console.print(f"{len(found)} of {len(chosen)} runs of {profile_name} are done; {corpus.describe()['name']}")
        bar_format = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}"
        with tqdm(total=sum(map(_cost, left)), desc="sweep", bar_format=bar_format, mininterval=1) as bar:
            if left:
                for line in workers.results(left, text, folder, profile.seeds[0], worker_count, command):
                    line = {"profile": profile_name, **line}
                    lines.append(path, line)
                    workers.forget(folder, line["run"])
                    found[line["run"]] = line
                    bar.set_postfix_str(f"{len(found)} of {len(chosen)} runs", refresh=False)
                    bar.update(_cost(chosen[line["run"]]))
        shutil.rmtree(folder, ignore_errors=True)
    ordered = [found[name] for name in chosen]
    console.print(table(ordered))
    return ordered


def _cost(config: Config) -> float:
    return _COST.get(config.method, 1.0)


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Keep a second sweep out of the folder for as long as this one works in it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        stream = (out / ".lock").open("w")
    except OSError as error:
        raise ValueError(f"--out: {out} cannot be written ({error.strerror}); pass a writable folder.") from None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"--out: another sweep works in {out}; wait for it, or pass another folder.") from None
        yield


def _finished(path: Path, chosen: dict[str, Config], corpus: Corpus) -> dict[str, dict[str, Any]]:
    """The lines in the file by run. Raises ValueError if one is not of this very sweep."""
    found = {}
    for line in lines.read(path):
        config = chosen.get(line["run"])
        configuration, text = line["provenance"]["configuration"], line["corpus"]["sha256"]
        if config is None or not config.made(configuration) or text != corpus.sha256:
            raise ValueError(
                f"--out: {path} holds {line['run']} of another sweep, text or version; pass another folder."
            )
        found[line["run"]] = line
    return found


def table(found: list[dict[str, Any]]) -> Table:
    """Means over seeds of the figures a reader looks for first, on test text."""
    shown = Table(title="test loss in nats per character, mean over seeds")
    for column in (
        "method", "strength", "seeds", "clean loss", "increase at 1.0 RMS", "det J <= 0 in layers", "s / step",
    ):  # fmt: skip
        shown.add_column(column, no_wrap=column == "method")
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for line in found:
        groups.setdefault((line["method"], line["strength"]), []).append(line)
    for (method, strength), members in groups.items():
        whole = [line for line in members if line["status"] == "finished"]
        if not whole:
            shown.add_row(method, f"{strength:g}", "0", "diverged", "", "", "")
            continue
        noisy = [
            row["increase"]
            for line in whole
            for row in line["splits"]["test"]["perturbed"]
            if (row["kind"], row["level"]) == ("relative-embedding-noise", 1.0)
        ]
        timed = [line["seconds_per_step"] for line in whole if line["seconds_per_step"] is not None]
        shown.add_row(
            method,
            f"{strength:g}",
            str(len(whole)),
            f"{np.mean([line['splits']['test']['clean']['nats_per_character'] for line in whole]):.4f}",
            f"{np.mean(noisy):+.4f}",
            f"{np.mean([line['margins']['layers']['negative_share'] for line in whole]):.2%}",
            f"{np.mean(timed):.3f}" if timed else "-",
        )
    return shown
