"""The loader (stage 8 of the data pipeline): batches of the rows of all sources.

Every step's rows are split into blocks. Each thread has its blocks decoded, cut and (on CPU) rendered by a worker, on
Linux in a process of its own; the thread that receives a step's last block joins them.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import multiprocessing.util
import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from mmpretrain.data.block import Block, join
from mmpretrain.data.loader_worker import Worker, start_workers
from mmpretrain.data.schema import BadSampleBudgetError, LoaderError
from mmpretrain.data.source import Source
from mmpretrain.system import cores
from mmpretrain.types import Batch

log = logging.getLogger(__name__)
MIN_BLOCK, MAX_BLOCK = 64, 256  # rows
PATIENCE_S = 20.0  # seconds without a batch between warnings


class _Step:
    """The blocks of one step, as they arrive."""

    def __init__(self, slots: dict[str, list[range]]) -> None:
        self.slots = slots
        self.blocks: dict[str, list[Block | None]] = {name: [None] * len(parts) for name, parts in slots.items()}
        self.left = sum(map(len, slots.values()))
        self.result: dict[str, Block] = {}
        self.error: BaseException | None = None
        self.done = threading.Event()
        self.lock = threading.Lock()


class Loader:
    """Endless batches of this rank's rows.

    Source s at step t covers its slots [t * batch_size, (t+1) * batch_size), of which rank r gets the r-th part. On
    CPU workers also render; otherwise uint8 pixels are pinned, sent, and rendered on `device` in a stream of their
    own.

    Args:
        sources: by name.
        rank: of this process.
        world_size: number of processes.
        start: source -> slots already consumed, as returned by `position`.
        threads: that decode; default: one per core, at most 16.
        processes: give each of them a process of its own; default: where the system can fork.
        prefetch: steps prepared ahead; default: 4, or as many as keep all threads busy.
        device: of the batches.
        timeout_s: seconds after which a step is an error that names what was being read.

    Raises:
        ValueError: an argument out of range, or a batch size that the ranks do not divide.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        *,
        rank: int = 0,
        world_size: int = 1,
        start: Mapping[str, int] | None = None,
        threads: int | None = None,
        processes: bool | None = None,
        prefetch: int | None = None,
        device: torch.device | str = "cpu",
        timeout_s: float = 600.0,
    ) -> None:
        for name, value in {"threads": threads, "prefetch": prefetch}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} {value}: at least 1 is needed")
        if not sources or not 0 <= rank < world_size:
            raise ValueError(f"sources {list(sources)}, rank {rank} of {world_size}: at least one source, and a rank below the number")
        for name, source in sources.items():
            if source.batch_size < 1 or source.batch_size % world_size:
                raise ValueError(f"source {name!r}: batch_size {source.batch_size} does not divide among {world_size} ranks")
        self.sources = dict(sources)
        self.device, self.timeout_s = torch.device(device), timeout_s
        self._rank, self._world = rank, world_size
        self._position = {name: int((start or {}).get(name, 0)) for name in sources}
        self._scheduled = dict(self._position)
        self._skipped: list[dict[str, Any]] = []
        self._transparent = dict.fromkeys(sources, 0)
        if rank == 0 and not any(self._position.values()):  # every rank detects the same damage
            self._skipped = [record for source in sources.values() for record in source.damaged()]
        self.wait_s = 0.0
        threads = threads or min(16, cores())
        rows = [source.batch_size // world_size for source in sources.values()]
        self._block = min(MAX_BLOCK, max(MIN_BLOCK, -(-max(rows) // threads)))
        blocks = sum(-(-n // self._block) for n in rows)
        self._ahead = prefetch or max(4, -(-2 * threads // blocks))
        self._steps: deque[_Step] = deque()
        self._staged: tuple[_Step, Batch] | None = None
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._queue: queue.SimpleQueue[tuple[_Step, str, int] | None] = queue.SimpleQueue()
        self._closed = False
        self._workers = start_workers(threads, processes, self.sources, render=self.device.type == "cpu")
        _open.add(self)
        if multiprocessing.parent_process() is not None:  # where `atexit` has no effect
            multiprocessing.util.Finalize(None, _close_all, exitpriority=100)
        try:
            self._start_threads()
        except BaseException:
            self.close(0.0)
            raise

    def _start_threads(self) -> None:
        """Start the threads, each of which computes on one core.

        OpenMP's number of threads is per thread, but torch also uses the last value set for threads that start later:
        the calling thread restores its own.
        """
        own = torch.get_num_threads()
        ready = threading.Barrier(len(self._workers) + 1)

        def run(worker: Worker) -> None:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # pinning would open a context on device 0
            torch.set_num_threads(1)
            torch.get_num_threads()  # a thread's first call adopts torch's last value, which must be this one
            try:
                ready.wait()
                ready.wait()
            except threading.BrokenBarrierError:  # another thread could not start
                return
            while (job := self._queue.get()) is not None:
                self._work(worker, *job)

        # Daemons: a thread that hangs in a file system must not keep the process from ending.
        self._threads = [
            threading.Thread(target=run, args=(worker,), name=f"loader-{i}", daemon=True) for i, worker in enumerate(self._workers)
        ]
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:
            ready.abort()
            raise
        ready.wait()
        torch.set_num_threads(own)
        ready.wait()

    def _schedule(self) -> None:
        slots: dict[str, list[range]] = {}
        for name, source in self.sources.items():
            share = source.batch_size // self._world
            first = self._scheduled[name] + self._rank * share
            slots[name] = [range(slot, min(slot + self._block, first + share)) for slot in range(first, first + share, self._block)]
            source.read_ahead(self._scheduled[name])
            self._scheduled[name] += source.batch_size
        step = _Step(slots)
        self._steps.append(step)
        for name, parts in slots.items():
            for i in range(len(parts)):
                self._queue.put((step, name, i))

    def _work(self, worker: Worker, step: _Step, name: str, i: int) -> None:
        try:
            if not self._closed and step.error is None:
                step.blocks[name][i] = self.sources[name].account(worker.block(name, step.slots[name][i]))
        except BaseException as error:
            step.error = step.error or error
        with step.lock:
            step.left -= 1
            last = step.left == 0
        if last:
            try:
                if step.error is None and not self._closed:
                    for source, blocks in step.blocks.items():
                        joined = join(blocks)  # type: ignore[arg-type]
                        step.result[source] = joined.render() if self.device.type == "cpu" else joined.render("text").moved(self._pin)
                    step.blocks.clear()
            except BaseException as error:
                step.error = error
            step.done.set()

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise StopIteration
        started = time.perf_counter()
        while len(self._steps) < self._ahead:
            self._schedule()
        step = self._steps[0]
        while not step.done.wait(max(0.0, min(PATIENCE_S, self.timeout_s - (waited := time.perf_counter() - started)))):
            reading = "; ".join(sorted(set().union(*(worker.reading() for worker in self._workers)))) or "no sample"
            if waited >= self.timeout_s:
                self.close(wait_s=0)
                raise LoaderError(f"the loader made no batch in {self.timeout_s:g} s; it is reading {reading}. Is the file system alive?")
            if waited >= PATIENCE_S:
                log.warning("no batch for %.0f s; the loader is reading %s", waited, reading)
        if step.error is not None:
            self.close()
            self._skipped += self._unseen(step.error)
            raise step.error
        staged, self._staged = self._staged, None
        batch = staged[1] if staged is not None and staged[0] is step else self._on_device(step)
        self._steps.popleft()
        self._schedule()
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)
            for tensor in _tensors(batch):
                tensor.record_stream(current)
            if self._steps[0].done.is_set() and self._steps[0].error is None:  # sent and rendered while this batch trains
                self._staged = (self._steps[0], self._on_device(self._steps[0]))
        for name, block in step.result.items():
            self._position[name] += self.sources[name].batch_size
            self._skipped += block.skipped
            self._transparent[name] += block.transparent
        self.wait_s = time.perf_counter() - started
        return batch

    def _unseen(self, raised: BaseException) -> list[dict[str, Any]]:
        """The bad samples of steps that no batch will be handed out of, but for those that the error that is raised lists."""
        records = []
        for step in self._steps:
            made = [block for blocks in list(step.blocks.values()) for block in blocks if block is not None] or list(step.result.values())
            records += [record for block in made for record in block.skipped]
            if isinstance(step.error, BadSampleBudgetError) and step.error is not raised:
                records += step.error.records
        return records

    def _on_device(self, step: _Step) -> Batch:
        if self.device.type == "cpu":
            return {name: block.to_rows() for name, block in step.result.items()}
        with torch.cuda.stream(self._stream):
            return {
                name: block.moved(lambda tensor: tensor.to(self.device, non_blocking=True)).to_rows() for name, block in step.result.items()
            }

    def position(self) -> dict[str, int]:
        """Return the slots consumed by the batches returned so far, per source, for a checkpoint."""
        return dict(self._position)

    def transparent(self) -> dict[str, int]:
        """How many images of the batches handed out here had transparent pixels, per source."""
        return dict(self._transparent)

    def drain_skipped(self) -> list[dict[str, Any]]:
        """Return the samples replaced in batches since the last call: {source, shard, key, reason, detail, slot, replaced_by}.

        After an error, also those of batches that were being made.
        """
        records, self._skipped = self._skipped, []
        return records

    def close(self, wait_s: float = 5.0) -> None:
        """Stop the threads and wait for them; hanging ones end with the process."""
        if not self._closed:
            self._closed = True
            for _ in self._workers:
                self._queue.put(None)
        end = time.monotonic() + wait_s  # waits again where an earlier call did not wait to the end
        for thread in self._threads:
            if thread.ident is not None:  # it started
                thread.join(max(0.0, end - time.monotonic()))
        for worker in self._workers:
            worker.stop()
        for worker in self._workers:
            worker.close(max(0.0, end - time.monotonic()))


_open: weakref.WeakSet[Loader] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):  # a forked process must not close its parent's
    os.register_at_fork(after_in_child=_open.clear)


@atexit.register
def _close_all() -> None:
    """Close all loaders: a daemon thread inside torch would abort the process when the interpreter exits."""
    for loader in list(_open):
        loader.close()


def _tensors(batch: Batch) -> Iterator[torch.Tensor]:
    for rows in batch.values():
        yield rows.seeds
        yield from rows.labels.values()
        for view in rows.views.values():
            yield from (tensor for tensor in view if tensor is not None)
