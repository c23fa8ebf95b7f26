"""Operating systems: the cores that this process may use, and file locks."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

log = logging.getLogger(__name__)


def cores() -> int:
    """Return the number of cores this process may use: fewer than the machine has in a container or under taskset."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS, Windows


def lock_across_forks() -> threading.Lock:
    """Make a lock that is free in a forked process, whichever thread held it before."""
    lock = threading.Lock()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    return lock


_held: weakref.WeakSet[IO[str]] = weakref.WeakSet()


def _let_go() -> None:
    for file in list(_held):
        file.close()


if hasattr(os, "register_at_fork"):  # a forked process that outlives this one must not keep its locks
    os.register_at_fork(after_in_child=_let_go)


def hold(path: str | Path, wait: bool = True) -> IO[str]:
    """Lock the file `path`, created if missing, until the returned file is closed or this process ends in any way.

    Without file locks (Windows, some network file systems) it locks nothing; on Windows it logs a warning.

    Args:
        path: of the lock file.
        wait: for another process that holds it.

    Raises:
        BlockingIOError: another process holds it and `wait` is false.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    file = Path(path).open("w")  # noqa: SIM115 (the caller closes it)
    _held.add(file)
    if fcntl is None:
        log.warning("this system has no file locks: make sure that no other process writes to %s", Path(path).parent)
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        raise
    except OSError:  # a file system without locks
        pass
    return file
