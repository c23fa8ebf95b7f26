"""Background writing of the demo's shards, by another process while this one imports its libraries and trains.

`python -m data_prep.demo.background ROOT SPLIT ...` is that process: it writes the missing splits, under a lock, and exits.
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

QUIET_NICENESS = 10  # of writing for which training does not wait


class DemoError(MMPretrainError, RuntimeError):
    """The demo's shards could not be written; the message names the splits and the remedy."""


def lock_path(root: Path | str) -> Path:
    """Returns the path of the lock that a process holds while it writes to `root`."""
    root = Path(root)
    return root.parent / f".{root.name}.lock"


class Writing:
    """Demo splits, the missing ones of which another process writes; `wait` before reading them."""

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
            stdin=subprocess.PIPE,  # never written to: it closes when this process ends in any way, and the writer exits
            stdout=subprocess.DEVNULL if quiet else None,  # its progress would disturb a live display; errors are still shown
            env=environment,
            start_new_session=True,  # this process alone handles an interrupt from the keyboard
        )

    def wait(self) -> None:
        """Waits until all splits are written. Raises DemoError where they could not be."""
        if self._refused is not None:
            raise DemoError(self._refused)
        if self._process is not None and (status := self._process.wait()):
            splits = " ".join(f"--split {split}" for split in self.splits)
            raise DemoError(
                f"the process that writes the demo splits {', '.join(self.splits)} failed (exit status {status}); its error, if any, is "
                f"above. Try it alone: python -m data_prep demo {self.root} {splits}"
            )

    def stop(self) -> None:
        """Ends the writer. A split is renamed when complete, so the next run writes the missing ones."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()


def _end_with_parent() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


def main(arguments: list[str]) -> int:
    """Writes the splits named on the command line; returns the exit status."""
    quiet = arguments[:1] == ["--quiet"]
    root, *splits = arguments[quiet:]
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that an incomplete split is removed
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if quiet and hasattr(os, "nice"):
        os.nice(QUIET_NICENESS)
    try:
        with file_errors(), hold(lock_path(root)):  # one process writes; the others of this machine wait, and use its files
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
    """The demo shards in `root`: missing training splits are written first, evaluation splits during training."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self._training = Writing(self.root, TRAINING)
        self._evaluation: Writing | None = None

    def prepare(self, config: Config) -> DataInProgress:
        """Waits for the splits that `config` trains on, and starts writing the others in the background.

        Returns:
            The splits that are still being written.

        Raises:
            DemoError: the training splits could not be written.
        """
        from mmpretrain.evaluation import DataInProgress

        self._training.wait()
        self._evaluation = evaluation = Writing(self.root, EVALUATION, quiet=True)
        if any(str(self.root / split) in repr(source.shards) for split in EVALUATION for source in config.sources.values()):
            evaluation.wait()
        return DataInProgress({(self.root / split).absolute(): evaluation.wait for split in EVALUATION})

    def stop(self) -> None:
        """Ends the writers."""
        for writing in (self._training, self._evaluation):
            if writing is not None:
                writing.stop()
