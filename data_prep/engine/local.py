"""The local engine: worker processes that apply a function to tasks sent over pipes.

Workers are fresh processes that import only what the function needs (a `multiprocessing` child would first import the
calling script, torch included). The task of a worker that is killed is repeated by another.
"""

from __future__ import annotations

import importlib
import io
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import IO, Any

from data_prep.engine.common import REPEATS, ahead, lost
from mmpretrain.picklable import picklable

_LENGTH = struct.Struct("<Q")


def _send(pipe: IO[bytes], value: object) -> None:
    data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.write(_LENGTH.pack(len(data)) + data)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> bytes:
    """Reads one message. Raises EOFError where the other end is closed."""
    head = pipe.read(_LENGTH.size)
    data = pipe.read(_LENGTH.unpack(head)[0]) if len(head) == _LENGTH.size else b""
    if len(head) < _LENGTH.size or len(data) < _LENGTH.unpack(head)[0]:
        raise EOFError
    return data


class _Worker:
    """A process that applies `function` to the tasks it receives, and exits when this process ends."""

    def __init__(self, function: bytes, stopped: threading.Event) -> None:
        self._function, self._stopped = function, stopped
        self._start()

    def _start(self) -> None:
        root = str(Path(__file__).resolve().parents[2])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))}
        command = [sys.executable, "-c", "from data_prep.engine.local import work; work()"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        assert self.process.stdin is not None  # both are pipes
        assert self.process.stdout is not None
        self._tasks, self._results = self.process.stdin, self.process.stdout
        with suppress(BrokenPipeError):
            _send(self._tasks, (sys.path, self._function))

    def __call__(self, task: Any) -> Any:
        for attempt in range(REPEATS + 1):
            try:
                _send(self._tasks, task)
                succeeded, value = pickle.loads(_receive(self._results))
            except (EOFError, BrokenPipeError, ConnectionResetError):
                status = self.process.wait()
                self.stop()
                if self._stopped.is_set():  # nobody waits for the result
                    raise
                cause = f"exit status {status}" if status >= 0 else f"by {signal.Signals(-status).name}"
                if attempt == REPEATS:
                    raise lost(task, cause) from None
                self._start()
                continue
            if succeeded:
                return value
            raise value
        raise AssertionError("unreachable")

    def stop(self) -> None:
        self.process.kill()  # safe: an unfinished task has no effects
        self.process.wait()
        for pipe in (self._tasks, self._results):
            with suppress(BrokenPipeError, ValueError):  # unread tasks in the pipe
                pipe.close()


def results_of(function: Callable[[Any], Any], tasks: Iterator[Any], processes: int) -> Generator[Any, None, None]:
    """Yields `function(task)` for every task in order, from `processes` worker processes; see `engine.run`."""
    packed = pickle.dumps(function)
    idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
    started: list[_Worker] = []
    lock, stopped = threading.Lock(), threading.Event()

    def ask(task: Any) -> Any:
        worker = idle.get()
        try:
            if worker is None:  # started only when there is work for it
                worker = _Worker(packed, stopped)
                with lock:
                    started.append(worker)
            if stopped.is_set():
                raise RuntimeError("stopped")
            return worker(task)
        finally:
            idle.put(worker)

    for _ in range(processes):
        idle.put(None)
    pool = ThreadPoolExecutor(processes, thread_name_prefix="worker")
    try:
        with closing(ahead(lambda task: pool.submit(ask, task), Future.result, tasks, 2 * processes)) as results:
            yield from results
    finally:
        stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)
        with lock:
            for worker in started:
                worker.process.kill()
        pool.shutdown(wait=True)
        for worker in started:
            worker.stop()


def _listen(pipe: IO[bytes], messages: queue.SimpleQueue[bytes]) -> None:
    while True:
        try:
            messages.put(_receive(pipe))
        except EOFError:  # the parent process is gone
            os._exit(1)


def work() -> None:
    """Runs a worker: reads tasks from standard input and writes results to the original standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent stops its workers
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of the function must not mix with the results
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(os.fdopen(os.dup(0), "rb"), messages), daemon=True).start()
    sys.stdin = io.StringIO()
    paths, packed = pickle.loads(messages.get())
    sys.path[:] = paths
    importlib.invalidate_caches()
    try:
        function = pickle.loads(packed)
    except (AttributeError, ImportError) as error:
        missing = RuntimeError(f"a worker process cannot import the function ({error}). Put it into a module, or pass --processes 1.")
        function = _Raises(missing)
    while True:
        task = pickle.loads(messages.get())
        try:
            answer = (True, function(task))
        except BaseException as error:
            answer = (False, picklable(error, "in a worker process"))
        _send(results, answer)


class _Raises:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, task: object) -> None:
        raise self.error
