"""Loader workers: each makes blocks, in the calling thread or in a forked process.

A process has an interpreter of its own, where threads would take turns in one between the hundred short calls of an
image. Pixels are passed in memory that both sides map: a memory file that the process creates, fills, and fills again
once the parent has released all tensors over it. Nothing is copied, and nothing counts against /dev/shm. In a process
forked off the parent, such a batch is valid only while the parent holds it too.

The workers of data_prep (`data_prep.engine.local`) are another kind, for another task: fresh processes without torch, for functions without
effects, so that the task of one that is killed is done again. These are forked with the open sources, and lend memory, so that the batch of
one that ends is lost and the run says so.
"""

from __future__ import annotations

import contextlib
import functools
import io
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmpretrain.data import buffers
from mmpretrain.data.block import Block
from mmpretrain.data.schema import LoaderError
from mmpretrain.data.source import Source
from mmpretrain.picklable import picklable
from mmpretrain.types import ViewSpec

WATCH_S = 0.2  # seconds between checks of an idle process that its parent is alive
PLACE_BYTES = 1024
Memory = tuple[int, int]  # a memory file: number, bytes


class ThreadWorker:
    """A worker that makes blocks in the calling thread; on CPU it renders the images too."""

    def __init__(self, sources: Mapping[str, Source], render: bool) -> None:
        self.sources, self._render = sources, render

    def block(self, source: str, slots: range) -> Block:
        """Make the block of these slots."""
        block = self.sources[source].make(slots)
        return block.render("image") if self._render else block

    def reading(self) -> set[str]:
        """Return the samples that all threads are reading at this moment."""
        return {place for source in self.sources.values() for place in list(source.reading.values())}

    def stop(self) -> None:
        """Do nothing: the thread ends by itself."""

    def close(self, wait_s: float) -> None:
        """Do nothing."""


class ProcessWorker:
    """A worker in a forked process. One thread calls it; any thread may release the tensors."""

    def __init__(self, sources: Mapping[str, Source], render: bool) -> None:
        self._views = {name: source.views for name, source in sources.items()}
        self._place = _Place()
        self._connection, theirs = multiprocessing.Pipe()
        self._maps: dict[int, np.ndarray] = {}
        self._released: deque[int] = deque()
        context = multiprocessing.get_context("fork")
        arguments = (ThreadWorker(sources, render), theirs, self._connection, self._place, os.getpid())
        self._process = context.Process(target=_serve, args=arguments, daemon=True, name="loader")
        with warnings.catch_warnings():  # Python 3.12 warns of other threads; shared locks are `lock_across_forks`
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process.start()
        theirs.close()

    def block(self, source: str, slots: range) -> Block:
        """Make the block of these slots. Raises the exception of the process, or LoaderError where it ended."""
        released = [self._released.popleft() for _ in range(len(self._released))]
        try:
            self._connection.send((source, slots, released))
            made: list[Memory] = self._connection.recv()
            for number, size in made:
                self._maps[number] = _map(reduction.recv_handle(self._connection), size)
            error, data = self._connection.recv()
        except (EOFError, OSError) as ended:
            raise self._ended() from ended
        if error is not None:
            raise error
        return _Reader(data, self._views[source], self._lend).load()

    def _ended(self) -> LoaderError:
        self._process.join(1)
        reading, status = self._place.text(), self._process.exitcode
        why = f"a loader process ended with status {status}" + (f" while reading {reading}" if reading else "")
        if status == -signal.SIGKILL:
            why += ". It was killed, most often because memory ran out: fewer loader_threads or a smaller prefetch need less"
        return LoaderError(why + ".")

    def _lend(self, number: int) -> np.ndarray:
        """Return the memory, held as long as a tensor over it lives; then the process may fill it again."""
        lent = self._maps[number][:]
        weakref.finalize(lent, self._released.append, number).atexit = False
        return lent

    def reading(self) -> set[str]:
        """Return the sample that the process is reading at this moment."""
        return {self._place.text()} - {""}

    def stop(self) -> None:
        """Let the process exit when it is idle."""
        with contextlib.suppress(OSError):  # it has exited already
            self._connection.send(None)

    def close(self, wait_s: float) -> None:
        """Wait for the process, and kill it if it is busy for longer than `wait_s`."""
        self._process.join(wait_s)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(0.5)  # unless the kernel holds it, in a file system that hangs


Worker = ThreadWorker | ProcessWorker


def start_workers(count: int, processes: bool | None, sources: Mapping[str, Source], render: bool) -> list[Worker]:
    """Start workers.

    Args:
        count: their number.
        processes: fork a process for each; None: where the system can fork and has memory files, as Linux.
        sources: by name.
        render: let workers render the images.

    Raises:
        ValueError: `processes` is true and the system cannot fork.
    """
    forkable = hasattr(os, "fork") and hasattr(os, "memfd_create") and not multiprocessing.current_process().daemon
    if processes and not forkable:
        raise ValueError("loader processes need Linux and a process that may have children: leave loader_processes out or set it to false")
    workers: list[Worker] = []
    try:
        for _ in range(count):
            workers.append((ThreadWorker if processes is False or not forkable else ProcessWorker)(sources, render))
    except BaseException:
        for worker in workers:
            worker.close(0.0)  # kills it
        raise
    return workers


def _map(file: int, size: int) -> np.ndarray:
    """Map a memory file as uint8 [size], and close `file` (Python's mmap would keep a second descriptor open)."""
    mapped = torch.from_file(f"/proc/self/fd/{file}", shared=True, size=size, dtype=torch.uint8).numpy()
    os.close(file)
    return mapped


class _Place:
    """The sample that a process is reading, visible to its parent; takes the place of `Source.reading`."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, PLACE_BYTES)  # shared with forked processes

    def __setitem__(self, thread: int, text: str) -> None:
        data = text.encode("utf-8", "replace")[: PLACE_BYTES - 1]
        self._memory[: len(data) + 1] = data + b"\0"

    def pop(self, *_: Any) -> Any:
        self._memory[:1] = b"\0"

    def text(self) -> str:
        return self._memory[:].partition(b"\0")[0].decode("utf-8", "replace")


class _MemoryFiles(buffers.Buffers):
    """Buffers of a process that its parent also maps, and keeps mapped: each is reused."""

    kept = sys.maxsize

    def __init__(self) -> None:
        super().__init__()
        self._number: dict[int, int] = {}  # by address
        self._unsent: dict[int, tuple[int, int]] = {}  # number -> file and bytes, of those that the parent has not mapped
        self._block: dict[int, list[Tensor]] = {}  # by number: tensors of the current block
        self._lent: dict[int, list[list[Tensor]]] = {}  # by number: tensors of each block that the parent has not released

    def allocate(self, size: int) -> np.ndarray:
        """Allocate a memory file, uint8 [size]."""
        file = os.memfd_create("loader")
        os.ftruncate(file, size)
        memory = _map(os.dup(file), size)
        number = self._number[memory.ctypes.data] = len(self._number)
        self._unsent[number] = file, size
        return memory

    def lend(self, tensor: Tensor) -> tuple[int, int] | None:
        """Lend a tensor's memory, which is then not reused until `take_back`; return (number, offset in bytes), None for foreign memory."""
        start = tensor.untyped_storage().data_ptr()
        if start not in self._number:
            return None
        number = self._number[start]
        self._block.setdefault(number, []).append(tensor)
        return number, tensor.data_ptr() - start

    def take_back(self, numbers: list[int]) -> None:
        """Mark memory as released by the parent."""
        for number in numbers:  # of whichever block: they share the memory
            self._lent[number].pop()

    def send_new(self, connection: Connection, parent: int, sent: bool) -> None:
        """Send the parent the memory files that it has not mapped yet; `sent`: the current block follows."""
        block, self._block = self._block if sent else {}, {}
        for number, tensors in block.items():
            self._lent.setdefault(number, []).append(tensors)
        new = [(number, *self._unsent.pop(number)) for number in block if number in self._unsent]
        connection.send([(number, size) for number, _, size in new])
        for _, file, _ in new:
            reduction.send_handle(connection, file, parent)
            os.close(file)


class _Writer(pickle.Pickler):
    """Pickler of blocks: large tensors by their location in shared memory, view specs by their index in the source."""

    def __init__(self, file: io.BytesIO, views: list[ViewSpec], memory: _MemoryFiles) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._views, self._memory = views, memory

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, ViewSpec) and obj in self._views:
            return "view", self._views.index(obj)
        if not isinstance(obj, Tensor):
            return None
        if obj.nbytes < buffers.SMALL:
            return "bytes", obj.detach().contiguous().flatten().view(torch.uint8).numpy(), obj.dtype, obj.shape
        place = self._memory.lend(obj)
        if place is None:  # memory that the spec allocated itself
            obj = buffers.empty(obj.shape, obj.dtype).copy_(obj)
            place = self._memory.lend(obj)
        return "shared", place, obj.dtype, obj.shape, obj.stride()


class _Reader(pickle.Unpickler):
    """Unpickler of blocks in the parent, over the same memory."""

    def __init__(self, data: bytes, views: list[ViewSpec], lend: Callable[[int], np.ndarray]) -> None:
        super().__init__(io.BytesIO(data))
        self._views, self._lend = views, functools.cache(lend)

    def persistent_load(self, pid: Any) -> Any:
        kind, what, *layout = pid
        if kind == "view":
            return self._views[what]
        if kind == "bytes":
            dtype, shape = layout
            return torch.from_numpy(what).view(dtype).view(shape)
        (number, offset), (dtype, shape, stride) = what, layout
        return torch.from_numpy(self._lend(number)).view(dtype).as_strided(shape, stride, offset // dtype.itemsize)


def _serve(worker: ThreadWorker, connection: Connection, parents: Connection, place: _Place, parent: int) -> None:
    """Make blocks until stopped, or until the parent is gone; its end of the pipe is closed here, so that its exit is noticed."""
    parents.close()
    for number in (signal.SIGINT, signal.SIGTERM):  # the trainer handles them: it still needs batches for its last step
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    memory = _MemoryFiles()
    buffers.use(memory)
    for source in worker.sources.values():
        source.reading = place  # type: ignore[assignment]
    while True:
        while not connection.poll(WATCH_S):
            if os.getppid() != parent:
                return
        try:
            job = connection.recv()
            if job is None:
                return
            name, slots, released = job
            memory.take_back(released)
            error, data = None, io.BytesIO()
            try:
                _Writer(data, worker.sources[name].views, memory).dump(worker.block(name, slots))
            except BaseException as raised:
                error = picklable(raised, "in a loader process")
            memory.send_new(connection, parent, error is None)
            connection.send((error, data.getvalue()))
        except (EOFError, OSError):  # the parent is gone
            return
