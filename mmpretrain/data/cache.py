"""The cache of remote shards (stage 2 of the data pipeline): bounded, checked by size, with retries and read-ahead."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from mmpretrain.atomic import write_atomically
from mmpretrain.data.index import SUFFIX, ShardIndex, load
from mmpretrain.data.schema import ShardError
from mmpretrain.data.shard_names import in_order, is_remote
from mmpretrain.system import hold

log = logging.getLogger(__name__)
T = TypeVar("T")
CHUNK = 1 << 22
STALE_S = 3600.0  # a temporary file unchanged for this long belongs to a dead process


def default_folder() -> Path:
    """Return the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmpretrain"


def filesystem(url: str) -> tuple[Any, str]:
    """(fsspec file system, path in it). Raises ShardError for an unknown protocol or a missing package."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ShardError(f"{url}: {error}") from error


def retried(action: Callable[[], T], what: str, attempts: int = 5, first_wait: float = 0.5) -> T:
    """Run `action` until it succeeds, with exponential back-off. Raises ShardError with the last cause; `what` is for messages."""
    for attempt in range(1, attempts + 1):
        try:
            return action()
        except FileNotFoundError as error:
            raise ShardError(f"{what}: no such file") from error
        except Exception as error:  # network libraries raise errors of their own
            if attempt == attempts:
                raise ShardError(f"{what}: failed {attempts} times, last with {type(error).__name__}: {error}") from error
            log.warning("%s: %s: %s; trying again (%d of %d)", what, type(error).__name__, error, attempt, attempts)
            time.sleep(first_wait * 2 ** (attempt - 1))
    raise AssertionError("unreachable")


def _read(url: str) -> bytes | None:
    system, path = filesystem(url)

    def read() -> bytes | None:
        with contextlib.suppress(FileNotFoundError):  # no check for existence: a cached listing may be older than the file
            return system.cat_file(path)
        return None

    return retried(read, url)


def stated_counts(names: Sequence[str]) -> np.ndarray:
    """Read the sample counts in the sizes.json {"00000.tar": 8123} beside shards.

    Args:
        names: S paths or URLs of shards.

    Returns:
        int64 [S], -1 without a stated count.

    Raises:
        ShardError: a sizes.json has another form.
    """
    counts = np.full(len(names), -1, np.int64)
    folders = {name.rpartition("/")[0]: name.startswith("/") for name in names}
    for folder, rooted in folders.items():
        place = f"{folder}/sizes.json" if folder or rooted else "sizes.json"
        if is_remote(place):
            data = _read(place)
        else:
            data = Path(place).read_bytes() if Path(place).is_file() else None
        if data is None:
            continue
        if len(folders) == 1 and (listed := in_order(data, names)) is not None:
            return np.array(listed, np.int64)
        try:
            sizes = {str(key): int(value) for key, value in json.loads(data).items()}
        except (ValueError, AttributeError, TypeError) as error:
            raise ShardError(f'{place}: expected {{"00000.tar": count, ...}} ({error}). Correct or delete it.') from error
        for i, name in enumerate(names):
            parent, _, base = name.rpartition("/")
            if parent == folder and base in sizes:
                counts[i] = sizes[base]
    return counts


def read_sizes(names: Sequence[str]) -> dict[str, int]:
    """Return shard -> its stated sample count, for those that have one; see `stated_counts`."""
    return {name: count for name, count in zip(names, stated_counts(names).tolist()) if count >= 0}


def remote_index(url: str) -> ShardIndex | None:
    """Fetch the index beside a remote shard; None without one."""
    data = _read(url + SUFFIX)
    return None if data is None else load(io.BytesIO(data))[0]


class ShardCache:
    """Local copies of remote shards, the least recently used of which are deleted when they exceed `max_bytes`.

    A deleted copy that is open stays readable until it is closed. Indexes of shards in read-only folders are saved in
    `indexes`.

    Args:
        folder: of the copies; default: the user's cache folder.
        max_bytes: of all copies.
        attempts: to fetch a shard.
        first_wait: seconds after the first failure; doubled after each further one.
    """

    def __init__(self, folder: str | Path | None = None, max_bytes: int = 100 << 30, attempts: int = 5, first_wait: float = 0.5) -> None:
        self.folder = Path(folder) if folder else default_folder()
        self.indexes = self.folder / "indexes"
        self.max_bytes, self._attempts, self._first_wait = max_bytes, attempts, first_wait
        self._begin()

    def _begin(self) -> None:
        """Set the state that is not shared with a parent process."""
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._running: dict[str, Future[str]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def _place(self, url: str) -> Path:
        return self.folder / "shards" / (hashlib.sha256(url.encode()).hexdigest()[:24] + ".tar")

    def fetch(self, url: str) -> str:
        """Return the path of the local copy, after fetching it or waiting for a fetch in progress. Raises ShardError."""
        future = self._start(url)
        path = future.result()
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)  # marks it as used
            return path
        with self._lock:
            self._running.pop(url, None)
        return self._start(url).result()

    def read_ahead(self, urls: list[str]) -> None:
        """Start to fetch these shards."""
        for url in urls:
            self._start(url)

    def _start(self, url: str) -> Future[str]:
        if self._process != os.getpid():  # forked: the fetching threads exist only in the parent
            self._begin()
        with self._lock:
            running = self._running.get(url)
            if running is None or (running.done() and (running.exception() is not None or not os.path.exists(running.result()))):
                self._pool = self._pool or ThreadPoolExecutor(4, thread_name_prefix="fetch")
                running = self._running[url] = self._pool.submit(self._fetch, url)
            return running

    def _fetch(self, url: str) -> str:
        place = self._place(url)
        system, path = filesystem(url)
        size = retried(lambda: system.size(path), url, self._attempts, self._first_wait)
        if place.exists() and (size is None or place.stat().st_size == size):
            return str(place)
        with hold(self.folder / "locks" / place.stem):  # every rank of a machine wants the same shards
            if not (place.exists() and (size is None or place.stat().st_size == size)):
                place.parent.mkdir(parents=True, exist_ok=True)
                self._make_room(size or 0)
                retried(lambda: self._copy(system, path, size, place), url, self._attempts, self._first_wait)
        return str(place)

    @staticmethod
    def _copy(system: Any, path: str, size: int | None, place: Path) -> None:
        def fetch(out: BinaryIO) -> None:
            with system.open(path, "rb") as source:
                shutil.copyfileobj(source, out, CHUNK)
            if size is not None and out.tell() != size:
                raise OSError(f"{out.tell()} bytes received, expected {size}")

        write_atomically(place, fetch)

    def _make_room(self, needed: int) -> None:
        with self._lock:
            for file in (self.folder / "shards").glob("*.tmp-*"):  # left by a process that was killed
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - file.stat().st_mtime > STALE_S:
                        file.unlink()
            entries = []
            for file in (self.folder / "shards").glob("*.tar"):
                with contextlib.suppress(FileNotFoundError):
                    status = file.stat()
                    entries.append((status.st_mtime, status.st_size, file))
            total = sum(size for _, size, _ in entries)
            for _, size, file in sorted(entries):
                if total + needed <= self.max_bytes:
                    break
                file.unlink(missing_ok=True)
                total -= size
