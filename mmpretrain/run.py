"""The run folder: may this recipe use it, what was already done there, and what the end of a run leaves."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO, Any

import yaml

from mmpretrain.checkpoint import CheckpointError, load_json, newest_valid
from mmpretrain.config import Config, differences, plain
from mmpretrain.options import OptionError

RECIPE = "config.yaml"


def claim(config: Config) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, or None to start; and lines to say about it.

    Raises:
        OptionError: the folder holds a run of another recipe, or (resume=never) any run.
        CheckpointError: the folder holds checkpoints, none of them valid.
    """
    folder = Path(config.run_dir)
    stored = folder / RECIPE
    if not stored.exists():
        return None, []
    if config.resume == "never":
        raise OptionError(f"{folder} already holds a run and resume is never: choose another run_dir")
    old = yaml.safe_load(stored.read_text())
    old.pop("environment", None)
    found, messages = newest_valid(folder / "checkpoints")
    changed = differences(old, plain(config))
    if changed and (found is not None or messages):
        if config.resume != "force":
            raise OptionError(
                f"{folder} holds a run of a different recipe:\n  "
                + "\n  ".join(changed)
                + "\nChoose another run_dir, or resume=force to go on with this one"
            )
        messages += [f"resume=force: {line}" for line in changed]
    if found is None and messages:
        raise CheckpointError("\n".join([*messages, f"{folder} has no valid checkpoint left: remove the folder or choose another run_dir"]))
    if found is not None:
        messages.append(f"resuming from {found} (step {load_json(found, 'state')['step']})")
    return found, messages


def lock(config: Config) -> IO[str]:
    """Hold the run folder while the returned file is open; the system lets go of it when the process ends, however it ends.

    Raises:
        OptionError: another process trains in this folder.
    """
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise OptionError(f"another process is training in {folder}: wait for it, stop it, or choose another run_dir") from None
    except OSError:  # a file system without locks
        pass
    return file


def write_recipe(config: Config, environment: dict[str, Any]) -> None:
    """config.yaml: the resolved recipe and what it ran on."""
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(plain(config) | {"environment": environment}, sort_keys=False, allow_unicode=True)
    temporary = folder / f"{RECIPE}.tmp"
    temporary.write_text(text)
    temporary.replace(folder / RECIPE)
