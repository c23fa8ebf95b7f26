"""What the engines share: how often a task is given out, and in what order results come."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any

from mmpretrain.errors import MMPretrainError

ENGINES = ("local", "ray")
REPEATS = 3  # times that a task is given out again after its worker died


class WorkerLostError(MMPretrainError, RuntimeError):
    """The process that worked on a task died, and so did those that tried it again."""


def lost(task: object, how: str) -> WorkerLostError:
    text = repr(task)
    text = text if len(text) <= 300 else text[:300] + " ..."
    return WorkerLostError(
        f"task {text}: its worker process died {REPEATS + 1} times ({how}). Its own words, if any, are above. "
        "If memory ran out, take fewer --processes or a smaller --max-count."
    )


def ahead(give: Callable[[Any], Any], take: Callable[[Any], Any], tasks: Iterator[Any], most: int) -> Generator[Any, None, None]:
    """Give tasks out, `most` ahead of what is taken, and take the results in order."""
    given: deque[Any] = deque()
    for task in tasks:
        given.append(give(task))
        if len(given) >= most:
            yield take(given.popleft())
    while given:
        yield take(given.popleft())
