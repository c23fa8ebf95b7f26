"""Functions for workers: a process that is started finds them by their module."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from data_prep.records import Record, Skipped


def square(task: int) -> int:
    return task * task


def slow_first(task: int) -> int:
    time.sleep(0.2 if task == 0 else 0)
    return task


def process(_: object) -> int:
    time.sleep(0.05)
    return os.getpid()


def torch_is_here(_: object) -> bool:
    return "torch" in sys.modules


def chatty(task: int) -> int:
    print("not a result", flush=True)
    os.write(1, b"nor this\n")
    return task


def fails(task: int) -> int:
    if task == 3:
        raise KeyError("no 3")
    return task


def killed_once(task: tuple[str, int]) -> int:
    """Leaves a mark in the folder before it is killed, so that the next attempt goes through."""
    folder, number = task
    mark = Path(folder) / f"killed-{number}"
    if number in (2, 5) and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def always_killed(task: int) -> int:
    if task == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def dies(_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def lives_on(task: str) -> None:
    Path(task).write_text(str(os.getpid()))
    time.sleep(60)


def records(task: tuple[int, ...]) -> Iterator[Record | Skipped]:
    """Small samples; every seventh number is left out."""
    for number in task:
        if number % 7 == 3:
            yield Skipped(f"input {number}", "sevenths", "left out")
        else:
            yield Record(f"k{number:05d}", {"jpg": bytes([number % 251]) * (500 + number % 700), "txt": b"number %d" % number})


def slow_records(task: tuple[int, ...]) -> Iterator[Record | Skipped]:
    for item in records(task):
        time.sleep(0.001)
        yield item
