"""8a. Loader workers: each makes blocks, in the thread that asks or in a process forked for it.

A process shares no interpreter with the trainer and the other workers, where threads take turns in one between the hundred short calls of
an image. Pixels cross in memory that both sides map: a memory file that the process makes, fills, and fills again once the parent has let
go of all tensors over it. Crossing copies nothing, and nothing counts against /dev/shm. To a process forked off the parent such a batch is
good only while the parent holds it, too.

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

WATCH_S = 0.2  # how often an idle process looks whether its parent lives
PLACE_BYTES = 1024
Memory = tuple[int, int]  # a memory file: number, bytes


class ThreadWorker:
    """Makes blocks in the thread that asks; on CPU it renders the images too."""

    def __init__(self, sources: Mapping[str, Source], render: bool) -> None:
        self.sources, self._render = sources, render

    def block(self, source: str, slots: range) -> Block:
        block = self.sources[source].make(slots)
        return block.render("image") if self._render else block

    def reading(self) -> set[str]:
        """What is being read at this moment, by all threads."""
        return {place for source in self.sources.values() for place in list(source.reading.values())}

    def stop(self) -> None:
        """Nothing to end: the thread ends by itself."""

    def close(self, wait_s: float) -> None:
        """The same."""


class ProcessWorker:
    """The same in a forked process of its own. One thread asks; any may let go of the tensors."""

    def __init__(self, sources: Mapping[str, Source], render: bool) -> None:
        self._views = {name: source.views for name, source in sources.items()}
        self._place = _Place()
        self._connection, theirs = multiprocessing.Pipe()
        self._maps: dict[int, np.ndarray] = {}
        self._released: deque[int] = deque()
        context = multiprocessing.get_context("fork")
        arguments = (ThreadWorker(sources, render), theirs, self._connection, self._place, os.getpid())
        self._process = context.Process(target=_serve, args=arguments, daemon=True, name="loader")
        with warnings.catch_warnings():  # Python 3.12 warns where other threads run; the locks that both need are `lock_across_forks`
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process.start()
        theirs.close()

    def block(self, source: str, slots: range) -> Block:
        """Raises what the process raised, or LoaderError where it ended."""
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
        at, status = self._place.text(), self._process.exitcode
        why = f"a loader process ended with status {status}" + (f" while reading {at}" if at else "")
        if status == -signal.SIGKILL:
            why += ". It was killed, most often because memory ran out: fewer loader_threads or a smaller prefetch need less"
        return LoaderError(why + ".")

    def _lend(self, number: int) -> np.ndarray:
        """The memory for as long as a tensor over it lives; then the process may fill it again."""
        lent = self._maps[number][:]
        weakref.finalize(lent, self._released.append, number).atexit = False
        return lent

    def reading(self) -> set[str]:
        return {self._place.text()} - {""}

    def stop(self) -> None:
        """Have the process end when it is done."""
        with contextlib.suppress(OSError):  # it ended already
            self._connection.send(None)

    def close(self, wait_s: float) -> None:
        """Wait for the process, and kill it if it is busy for longer than `wait_s`."""
        self._process.join(wait_s)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(0.5)  # unless the kernel holds it, in a file system that hangs


Worker = ThreadWorker | ProcessWorker


def start_workers(count: int, processes: bool | None, sources: Mapping[str, Source], render: bool) -> list[Worker]:
    """`count` workers; processes by default where the system can fork and has memory files, as Linux. Raises ValueError where it cannot."""
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
    """A memory file as uint8 [size]; `file` is closed (Python's own mmap would keep a second descriptor open)."""
    mapped = torch.from_file(f"/proc/self/fd/{file}", shared=True, size=size, dtype=torch.uint8).numpy()
    os.close(file)
    return mapped


class _Place:
    """What a process reads, where its parent can see it: stands for `Source.reading` there."""

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
    """Buffers of a process that its parent maps too, and does not let go of: each is used again."""

    kept = sys.maxsize

    def __init__(self) -> None:
        super().__init__()
        self._number: dict[int, int] = {}  # by address
        self._unsent: dict[int, tuple[int, int]] = {}  # number -> file and bytes, of those that the parent does not know
        self._block: dict[int, list[Tensor]] = {}  # by number: what the block at hand lends
        self._lent: dict[int, list[list[Tensor]]] = {}  # by number: that of each block that the parent has not let go of

    def allocate(self, size: int) -> np.ndarray:
        file = os.memfd_create("loader")
        os.ftruncate(file, size)
        memory = _map(os.dup(file), size)
        number = self._number[memory.ctypes.data] = len(self._number)
        self._unsent[number] = file, size
        return memory

    def lend(self, tensor: Tensor) -> tuple[int, int] | None:
        """(number, offset in bytes) of a tensor in memory of ours, which is not filled again until `take_back`; None for any other."""
        start = tensor.untyped_storage().data_ptr()
        if start not in self._number:
            return None
        number = self._number[start]
        self._block.setdefault(number, []).append(tensor)
        return number, tensor.data_ptr() - start

    def take_back(self, numbers: list[int]) -> None:
        for number in numbers:  # whichever block it was of: they are the same memory
            self._lent[number].pop()

    def send_new(self, connection: Connection, parent: int, sent: bool) -> None:
        """Tell the parent of the memory that it is about to see; `sent` says whether the block at hand goes to it."""
        block, self._block = self._block if sent else {}, {}
        for number, tensors in block.items():
            self._lent.setdefault(number, []).append(tensors)
        new = [(number, *self._unsent.pop(number)) for number in block if number in self._unsent]
        connection.send([(number, size) for number, _, size in new])
        for _, file, _ in new:
            reduction.send_handle(connection, file, parent)
            os.close(file)


class _Writer(pickle.Pickler):
    """A block for the parent: large tensors as their place in shared memory, view specs as their place in the source."""

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
        if place is None:  # memory of the spec's own
            obj = buffers.empty(obj.shape, obj.dtype).copy_(obj)
            place = self._memory.lend(obj)
        return "shared", place, obj.dtype, obj.shape, obj.stride()


class _Reader(pickle.Unpickler):
    """The block in the parent, over the same memory."""

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
    """Make blocks until told to stop, or until the parent is gone, which nobody notices while its own end of the line is open here."""
    parents.close()
    for number in (signal.SIGINT, signal.SIGTERM):  # the trainer's to answer: it still needs batches for its last step
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
        except (EOFError, OSError):  # nobody is there any more
            return
