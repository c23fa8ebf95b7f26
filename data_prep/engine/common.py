"""Retries, lost workers and bounded look-ahead, shared by the engines."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any

from mmpretrain.errors import MMPretrainError

ENGINES = ("local", "ray")
REPEATS = 3  # of a task whose worker died


class EngineError(MMPretrainError, ValueError):
    """An engine that cannot be used here: its library is missing, or it does not start."""


class WorkerLostError(MMPretrainError, RuntimeError):
    """The worker process of a task died, and so did the workers of every retry."""


def lost(task: object, how: str) -> WorkerLostError:
    """Builds the error for a task whose workers died; `how` describes the last death."""
    text = repr(task)
    text = text if len(text) <= 300 else text[:300] + " ..."
    return WorkerLostError(
        f"task {text}: its worker process died {REPEATS + 1} times ({how}). Its own output, if any, is above. "
        "If memory ran out, use fewer --processes or a smaller --max-count."
    )


def ahead(
    submit: Callable[[Any], Any], result_of: Callable[[Any], Any], tasks: Iterator[Any], max_pending: int
) -> Generator[Any, None, None]:
    """Submits tasks at most `max_pending` ahead of the results taken, and yields the results in order.

    Args:
        submit: task -> handle.
        result_of: handle -> result; waits for it.
        tasks: consumed lazily.
        max_pending: handles held at a time.
    """
    pending: deque[Any] = deque()
    for task in tasks:
        pending.append(submit(task))
        if len(pending) >= max_pending:
            yield result_of(pending.popleft())
    while pending:
        yield result_of(pending.popleft())
