"""Run a pure function over tasks: on this machine's cores, or on a Ray cluster. Results come in the order of the tasks."""

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
    """`function(task)` for every task, in the order of the tasks.

    Args:
        function: pure and picklable: of a module (not of `__main__`), a `functools.partial` of one, or a dataclass with `__call__`.
        tasks: pulled as workers become free, at most 2 x processes ahead of what the caller has taken.
        engine: "local", or "ray" (the cluster at RAY_ADDRESS, else one started on this machine).
        processes: how many at once; by default one per core, on Ray what the cluster has. 1 with "local" runs in this process, and so does
            everything where `function` or a task names a place in memory://.
        title: shown with a progress bar where standard error is a terminal.

    Raises WorkerLostError, whatever `function` raises, ValueError for an unknown engine.
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
        results = (function(task) for task in source)  # such files live in this process alone
    elif engine == "ray":
        from data_prep.engine import ray as cluster

        results = cluster.results_of(function, source, processes)
    else:
        most = processes or cores()
        alone = min(most, len(first)) < 2  # a process is not worth starting for a single task
        results = (function(task) for task in source) if alone else local.results_of(function, source, most)
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
