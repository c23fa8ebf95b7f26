"""Parallel map of a pure function over tasks, on the cores of this machine or on a Ray cluster; results in task order."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Generator, Iterable, Sized
from contextlib import closing
from typing import TypeVar

from data_prep.engine import local
from data_prep.engine.common import ENGINES, WorkerLostError
from mmpretrain.system import cores

__all__ = ["ENGINES", "WorkerLostError", "run"]

Task = TypeVar("Task")
R = TypeVar("R")


def run(
    function: Callable[[Task], R],
    tasks: Iterable[Task],
    *,
    engine: str = "local",
    processes: int | None = None,
    title: str = "",
) -> Generator[R, None, None]:
    """Yields `function(task)` for every task, in the order of the tasks.

    Args:
        function: pure and picklable: of a module (not of `__main__`), a `functools.partial` of one, or a dataclass with
            `__call__`.
        tasks: consumed as workers become free, at most 2 x processes ahead of the results taken.
        engine: "local", or "ray" (the cluster at RAY_ADDRESS, else one started on this machine).
        processes: tasks at a time; by default one per core, or per CPU of the Ray cluster. With "local", 1 runs in this
            process. Functions and tasks that refer to memory:// always run in this process.
        title: of a progress bar, shown where standard error is a terminal.

    Raises:
        EngineError: Ray is missing or does not start.
        WorkerLostError: the workers of a task died repeatedly.
        ValueError: an unknown engine, or fewer than one process.
        Exception: whatever `function` raises.
    """
    if engine not in ENGINES:
        raise ValueError(f"--engine {engine!r}: expected {' or '.join(ENGINES)}")
    if processes is not None and processes < 1:
        raise ValueError(f"--processes {processes}: expected at least 1")
    total = len(tasks) if isinstance(tasks, Sized) else None
    source = iter(tasks)
    first = list(itertools.islice(source, 2))
    source = itertools.chain(first, source)
    if any("memory://" in repr(each) for each in (function, *(tasks if isinstance(tasks, list) else first))):
        results = (function(task) for task in source)  # such files exist in this process only
    elif engine == "ray":
        from data_prep.engine import ray as cluster

        results = cluster.results_of(function, source, processes)
    else:
        max_workers = processes or cores()
        in_process = min(max_workers, len(first)) < 2  # starting a process is not worthwhile for a single task
        results = (function(task) for task in source) if in_process else local.results_of(function, source, max_workers)
    return _shown(results, title, total) if title and sys.stderr.isatty() else results


def _shown(results: Generator[R, None, None], title: str, total: int | None) -> Generator[R, None, None]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with closing(results), Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(title, total=total)
        for result in results:
            yield result
            progress.advance(bar)
