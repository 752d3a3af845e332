"""Runs of a sweep in processes of one thread each, so that a result does not depend on how many there are."""

import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jax

from models import corpus as corpus_module
from models.char_gpt import lines, training
from models.char_gpt.config import Config
from models.char_gpt.evaluation import measure
from models.char_gpt.run import parameter_count
from models.char_gpt.study import run_name
from prob_transformer.files import provenance

_WATCH_SECONDS = 1.0
# Read once a worker, not once a run.
_load = lru_cache(corpus_module.load)


def default_workers() -> int:
    """One for every core this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def results(
    configs: list[Config], text: Path | None, folder: Path, passage_seed: int, workers: int, command: str
) -> Iterator[dict[str, Any]]:
    """The line of every run as it finishes; unfinished ones keep their checkpoints in `folder`.

    Raises ValueError if a worker dies; what finished before has been handed out.
    """
    context = get_context("spawn")
    cores = context.Queue()
    for core in sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []:
        cores.put(core)
    arguments = (cores, os.getpid(), str(folder / "compiled"))
    # Fewer started processes than configurations would wait for nothing.
    count = min(workers, len(configs))
    with ProcessPoolExecutor(count, mp_context=context, initializer=_prepare, initargs=arguments) as pool:
        waiting: dict[Future[dict[str, Any]], Config] = {
            pool.submit(_line, config, text, folder, config.seed == passage_seed, command): config for config in configs
        }
        try:
            for future in as_completed(waiting):
                yield future.result()
        except BrokenProcessPool:
            raise ValueError(
                "a worker was killed, perhaps for memory; run the command again, with fewer --workers. Finished "
                "runs are kept."
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _prepare(cores: Any, parent: int, compiled: str) -> None:
    """One thread on one core, compiled steps shared with the other workers, and no life beyond the parent's."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    if hasattr(os, "sched_setaffinity") and not cores.empty():
        os.sched_setaffinity(0, {cores.get()})
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", compiled)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)


def _line(config: Config, text: Path | None, folder: Path, with_passage: bool, command: str) -> dict[str, Any]:
    """Train, measure, and return the run as a line; its checkpoint stays until `forget`."""
    corpus = _load(text, config.context + 1)
    line: dict[str, Any] = {
        "run": run_name(config),
        "method": config.method,
        "strength": config.strength,
        "seed": config.seed,
        "provenance": provenance(config.seed, config.as_dict(), command),
        "corpus": corpus.describe(),
    }
    try:
        state, record = training.train(config, corpus, folder / run_name(config), quiet=True)
    except training.TrainingDivergedError as error:
        return {**line, "status": "diverged", "message": str(error)}
    measured = {
        "status": "finished",
        "parameters": parameter_count(state.model),
        "wall_seconds": record["wall_seconds"],
        "seconds_per_step": training.seconds_per_step(record, config.steps),
        **measure(state.model, corpus, config, with_passage=with_passage),
        "watch": record["watch"],
        "crossings": record["crossings"],
        "halved_steps": int(state.halvings),
        "training": record["history"],
    }
    return {**line, **lines.shortened(measured)}


def forget(folder: Path, name: str) -> None:
    """Remove the checkpoint of a run whose line has been written."""
    shutil.rmtree(folder / name, ignore_errors=True)
