"""One pool of worker processes for all commands, fresh interpreters that die with their parent; and JAX's threads."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")
_SECONDS_BETWEEN_LOOKS = 1.0
# One for every core this process may use, where the operating system says which.
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def give_jax_threads() -> None:
    """Ask for more threads than cores in JAX's CPU pool; to be called before any computation, when JAX reads it.

    JAX 0.10 sizes the pool by the cores. With two of them a training step can end up waiting for itself: every thread
    of the pool idle, the step never ending (seen at batch 4, 8 and 12 on every run, not at 16, and not with JAX 0.12).
    """
    os.environ.setdefault("PJRT_NPROC", str(max(8, os.cpu_count() or 1)))


def as_finished(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    count: int,
    prepare: Callable[..., None],
    *arguments: Any,
    pinned: bool = False,
) -> Iterator[tuple[Task, Future[Result]]]:
    """Every task with its future, `function(task)`, as it finishes, from at most `count` processes at a time.

    `prepare(*arguments)` is called first in each. A pinned process keeps to a core of its own. Whoever asks a future of
    a process that was killed has BrokenProcessPool raised; tasks that have not begun are given up with the iterator.
    """
    # A fresh interpreter each: JAX does not survive a fork.
    context = get_context("spawn")
    cores = context.Queue()
    for core in CORES if pinned else []:
        cores.put(core)
    # No more processes than tasks: the others would wait for nothing.
    with ProcessPoolExecutor(min(count, len(tasks)), context, _begin, (os.getpid(), cores, prepare, arguments)) as pool:
        waiting = {pool.submit(function, task): task for task in tasks}
        try:
            for future in as_completed(waiting):
                yield waiting[future], future
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin(parent: int, cores: Any, prepare: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    if not cores.empty():
        os.sched_setaffinity(0, {cores.get()})
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    prepare(*arguments)


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    os._exit(1)
