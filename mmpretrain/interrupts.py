"""Handling of signals and of the launcher's exit: the run finishes its step, saves, and exits with status 0."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType


def launched() -> bool:
    """Return whether torchrun or `accelerate launch` started this process, rather than a shell."""
    return "LOCAL_RANK" in os.environ or any(name.startswith("ACCELERATE_") for name in os.environ)


class Interrupts:
    """Turns SIGTERM, SIGINT and the launcher's exit into `reason`, a clause that the training loop reads after each step.

    A second signal exits at once. A killed launcher sends no signal, so its exit is watched for: otherwise the worker
    would continue as an orphan. Without a launcher the parent is a shell, whose exit is ignored: `nohup train.py &`
    continues.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._parent = os.getppid()
        self._previous = {kind: signal.signal(kind, self._handle) for kind in (signal.SIGTERM, signal.SIGINT)}
        self._closed = threading.Event()
        if launched():
            threading.Thread(target=self._watch, name="launcher-watch", daemon=True).start()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None and time.monotonic() - self._since > 0.5:  # a launcher forwards what the terminal also sent
            os._exit(128 + number)
        if self.reason is None:
            self._since = time.monotonic()
            self.reason = f"{signal.Signals(number).name} was received"

    def _watch(self) -> None:
        while not self._closed.wait(1.0):
            if os.getppid() != self._parent:
                self._since = time.monotonic()
                self.reason = self.reason or "the launcher exited"
                return

    def close(self) -> None:
        """Restore the signal handlers, and stop watching the launcher."""
        self._closed.set()
        for kind, handler in self._previous.items():
            signal.signal(kind, handler)
