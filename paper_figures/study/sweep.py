"""Methods times strengths times seeds, one line a run in DIR/runs.jsonl; killed, it goes on where it was.

Every run has a process of one thread on a core of its own, so that its figures do not depend on how many run beside it.
"""

import fcntl
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from tqdm import tqdm

from models import corpus as corpus_module
from models import workers
from models.char_gpt import train
from models.char_gpt.config import in_names_of_today
from models.char_gpt.training_record import as_metrics
from models.corpus import Corpus
from paper_figures.study import runs
from paper_figures.study.design import PROFILES, Design, designs
from paper_figures.study.perturbations import measured
from prob_transformer.files import provenance
from prob_transformer.tables import text_table
from prob_transformer.transformer.network import parameter_count

UNFINISHED = "unfinished"
# Seconds of a run over those of plain cross-entropy, measured on one core at the size of the full profile; for the
# time left alone, which would be far off while the cheap methods of a seed come first.
_COST = {"margin@layers": 2.2, "one-sided@layers": 3.0, "map@layers": 4.0, "jacobian": 3.7}
# Read once a worker, not once a run.
_load = lru_cache(corpus_module.load)


def run_sweep(
    profile_name: str, text: Path | None, corpus: Corpus, out: Path, console: Console, worker_count: int | None = None
) -> list[runs.Run]:
    """Run or finish every run of a profile, one line each in `out`/runs.jsonl, print a table and return the lines.

    Raises ValueError for a worker count below 1, a worker that dies, an unwritable folder, one that holds other runs,
    or one in use.
    """
    worker_count = (len(workers.CORES) or os.cpu_count() or 1) if worker_count is None else worker_count
    if worker_count < 1:
        raise ValueError(f"--workers: got {worker_count}; pass an integer of at least 1.")
    profile = PROFILES[profile_name]
    chosen = {design.name: design for design in designs(profile)}
    path, folder = out / runs.NAME, out / UNFINISHED
    with _alone_in(out):
        if path.exists():
            runs.make_whole(path)
        found = _finished(path, chosen, corpus)
        left = [design for name, design in chosen.items() if name not in found]
        console.print(f"{len(found)} of {len(chosen)} runs of {profile_name} are done; {corpus.describe()['name']}")
        bar_format = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}"
        costs = {design.name: _COST.get(design.method, 1.0) for design in left}
        with tqdm(total=sum(costs.values()), desc="sweep", bar_format=bar_format, mininterval=1) as bar:
            command = shlex.join(["python", *sys.orig_argv[1:]])
            task = partial(line_of, text=text, folder=folder, passage_seed=profile.seeds[0], command=command)
            for line in _lines(task, left, worker_count, folder / "compiled"):
                line = {"profile": profile_name, **line}
                runs.append(path, line)
                # The checkpoint of a run is of no use once its line has been written.
                shutil.rmtree(folder / line["run"], ignore_errors=True)
                found[line["run"]] = line
                bar.set_postfix_str(f"{len(found)} of {len(chosen)} runs", refresh=False)
                bar.update(costs[line["run"]])
        shutil.rmtree(folder, ignore_errors=True)
    ordered = [found[name] for name in chosen]
    console.print(table(ordered), soft_wrap=True, markup=False, highlight=False)
    return ordered


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


def _finished(path: Path, chosen: dict[str, Design], corpus: Corpus) -> dict[str, runs.Run]:
    """The lines in the file by run. Raises ValueError if one is not of this very sweep."""
    found = {line["run"]: line for line in runs.read(path)}
    for name, line in found.items():
        saved = in_names_of_today(line["provenance"]["configuration"]), line["corpus"]["sha256"]
        if name not in chosen or saved != (chosen[name].configuration, corpus.sha256):
            raise ValueError(f"--out: {path} holds {name} of another sweep, text or version; pass another folder.")
    return found


def _lines(task: Any, left: list[Design], worker_count: int, compiled: Path) -> Iterator[runs.Run]:
    """The line of every run as it finishes. Raises ValueError if a worker dies; what finished has been handed out."""
    finished = workers.as_finished(task, left, worker_count, _prepare, str(compiled), pinned=True) if left else ()
    try:
        for _, future in finished:
            yield future.result()
    except BrokenProcessPool:
        raise ValueError(
            "a worker was killed, perhaps for memory; run the command again, with fewer --workers. Finished runs are kept."
        ) from None


def _prepare(compiled: str) -> None:
    """One thread, and compiled steps shared with the other workers."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", compiled)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def line_of(design: Design, text: Path | None, folder: Path, passage_seed: int, command: str) -> runs.Run:
    """Train, measure, and return the run as a line; its checkpoint stays in `folder`."""
    config = design.config
    corpus = _load(text, config.context + 1)
    line: runs.Run = {
        "run": design.name,
        "method": design.method,
        "strength": design.strength,
        "seed": config.seed,
        "provenance": provenance(config.seed, design.configuration, command),
        "corpus": corpus.describe(),
    }
    try:
        state, record = train.train_model(config, corpus, folder / design.name, design.loss, quiet=True)
    except train.TrainingDivergedError as error:
        return {**line, "status": "diverged", "message": str(error)}
    figures = {
        "status": "finished",
        "parameters": parameter_count(state.model),
        **measured(state.model, corpus, config, with_passage=config.seed == passage_seed),
        **as_metrics(record, config.steps, int(state.halvings)),
    }
    return {**line, **runs.shortened(figures)}


def table(found: list[runs.Run]) -> str:
    """Means over seeds of the figures a reader looks for first, on test text."""
    columns = ("method", "strength", "seeds", "clean loss", "increase at 1.0 RMS", "det J <= 0 in layers", "s / step")
    rows = []
    for method, strength in dict.fromkeys((line["method"], line["strength"]) for line in found):
        members = [line for line in found if (line["method"], line["strength"]) == (method, strength)]
        whole = [line for line in members if line["status"] == "finished"]
        cells = ["diverged", "", "", ""]
        if whole:
            clean = np.mean([runs.clean_loss(line, "test") for line in whole])
            rise = np.mean([runs.increase(line, "test", "relative-embedding-noise", 1.0) for line in whole])
            share = np.mean([line["margins"]["layers"]["negative_share"] for line in whole])
            timed = [line["seconds_per_step"] for line in whole if line["seconds_per_step"] is not None]
            seconds = f"{np.mean(timed):.3f}" if timed else "-"
            cells = [f"{clean:.4f}", f"{rise:+.4f}", f"{share:.2%}", seconds]
        rows.append([method, f"{strength:g}", str(len(whole)), *cells])
    title = "test loss in nats per character, mean over seeds"
    return f"{title}\n{text_table(columns, rows, range(1, len(columns)))}"
