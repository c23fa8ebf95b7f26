"""The demo's shards, written by another process while this one imports its libraries and trains.

`python -m data_prep.demo.background ROOT SPLIT ...` is that process: it writes what is missing, under a lock, and ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.demo.command import ensure_demo, module_command, unwritten
from data_prep.demo.scenes import SPLITS
from data_prep.records import OutputError
from mmpretrain.errors import MMPretrainError, file_errors
from mmpretrain.system import hold

if TYPE_CHECKING:
    from mmpretrain.config.recipe import Config
    from mmpretrain.evaluation import DataInProgress

QUIETLY = 10  # niceness of what training need not wait for


class DemoError(MMPretrainError, RuntimeError):
    """The demo's shards could not be written; its message says which and what to do."""


def lock_path(root: Path | str) -> Path:
    """Held by whoever writes into `root`."""
    root = Path(root)
    return root.parent / f".{root.name}.lock"


class Writing:
    """Demo splits that another process writes where they are missing; `wait` before they are read."""

    def __init__(self, root: Path | str, splits: Sequence[str], quiet: bool = False) -> None:
        self.root, self.splits = Path(root), list(splits)
        self._process: subprocess.Popen | None = None
        self._refused: str | None = None
        try:
            if missing := unwritten(self.root, splits=self.splits):
                self._process = self._start(missing, quiet)
        except OutputError as error:
            self._refused = str(error)

    def _start(self, splits: Sequence[str], quiet: bool) -> subprocess.Popen:
        command, environment = module_command("data_prep.demo.background")
        return subprocess.Popen(
            [*command, *(["--quiet"] if quiet else []), str(self.root), *splits],
            stdin=subprocess.PIPE,  # never written to: its end tells the writer that this process has ended, however it did
            stdout=subprocess.DEVNULL if quiet else None,  # its progress would run into a live display; errors are shown as they come
            env=environment,
            start_new_session=True,  # an interrupt from the keyboard is this process's to handle
        )

    def wait(self) -> None:
        """Until all is written. Raises DemoError where it could not be."""
        if self._refused is not None:
            raise DemoError(self._refused)
        if self._process is not None and (status := self._process.wait()):
            splits = " ".join(f"--split {split}" for split in self.splits)
            raise DemoError(
                f"the process that writes the demo splits {', '.join(self.splits)} failed (exit status {status}); its error, if any, is "
                f"above. Try it alone: python -m data_prep demo {self.root} {splits}"
            )

    def stop(self) -> None:
        """Written or not: a split takes its name when whole, and the next run writes what is missing."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()


def _end_with_parent() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


def main(arguments: list[str]) -> int:
    quiet = arguments[:1] == ["--quiet"]
    root, *splits = arguments[quiet:]
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that half a split is removed
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if quiet and hasattr(os, "nice"):
        os.nice(QUIETLY)
    try:
        with file_errors(), hold(lock_path(root)):  # one process writes them; the others of this machine wait, and find them
            ensure_demo(root, splits=splits)
    except MMPretrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))


TRAINING = ("pairs", "photos")
EVALUATION = tuple(split for split in SPLITS if split not in TRAINING)


class DemoData:
    """The demo shards in `root`, written where they are missing."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self._training = Writing(self.root, TRAINING)
        self._evaluation: Writing | None = None

    def prepare(self, config: Config) -> DataInProgress:
        """Wait for what `config` trains on, and have the rest written behind the training; -> what is not there yet. Raises DemoError."""
        from mmpretrain.evaluation import DataInProgress

        self._training.wait()
        self._evaluation = later = Writing(self.root, EVALUATION, quiet=True)
        if any(str(self.root / split) in repr(source.shards) for split in EVALUATION for source in config.sources.values()):
            later.wait()
        return DataInProgress({(self.root / split).absolute(): later.wait for split in EVALUATION})

    def stop(self) -> None:
        for writing in (self._training, self._evaluation):
            if writing is not None:
                writing.stop()
