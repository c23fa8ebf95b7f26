"""The run folder: the newest checkpoint, the resume check of the recipe, the lock, and config.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import yaml

from mmpretrain.atomic import write_atomically
from mmpretrain.checkpoint import CheckpointError, load_json, newest_valid
from mmpretrain.config.build import OptionError
from mmpretrain.config.recipe import Config, assemble, differences, plain
from mmpretrain.system import hold

RECIPE = "config.yaml"


def newest(config: Config) -> tuple[Path | None, list[str]]:
    """Return the checkpoint to resume from, or None to start; and a line for each newer one that was skipped.

    Raises:
        OptionError: the folder holds a run, and resume is never.
    """
    folder = Path(config.run_dir)
    if not (folder / RECIPE).exists():
        return None, []
    if config.resume == "never":
        raise OptionError(f"{folder} already holds a run and resume is never: choose another run_dir")
    return newest_valid(folder / "checkpoints")


def check_resume(config: Config, checkpoint: Path | None, skipped: list[str]) -> list[str]:
    """Check that this recipe may resume from `checkpoint`, and return messages about it.

    Args:
        config: the recipe.
        checkpoint: to resume from; None to start.
        skipped: messages about newer checkpoints that are not valid; see `newest`.

    Raises:
        OptionError: the folder holds a run of another recipe.
        CheckpointError: the folder holds checkpoints, none of them valid.
    """
    folder, messages = Path(config.run_dir), list(skipped)
    stored = folder / RECIPE
    if not stored.exists():
        return messages
    try:
        old = dict(yaml.safe_load(stored.read_text(encoding="utf-8")).items())
        old.pop("environment", None)
        changed = differences(as_read_now(old), plain(config))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:  # empty, cut, or not a mapping
        changed = [f"{stored} is damaged and cannot be compared: {error}"]
    if changed and (checkpoint is not None or messages):
        if config.resume != "force":
            raise OptionError(
                f"{folder} holds a run of a different recipe:\n  "
                + "\n  ".join(changed)
                + "\nChoose another run_dir, or resume=force to continue with this one"
            )
        messages += [f"resume=force: {line}" for line in changed]
    if checkpoint is None and messages:
        raise CheckpointError("\n".join([*messages, f"{folder} has no valid checkpoint left: remove the folder or choose another run_dir"]))
    if checkpoint is not None:
        messages.append(f"resuming from {checkpoint} (step {load_json(checkpoint, 'state')['step']})")
    return messages


def as_read_now(recipe: dict[str, Any]) -> dict[str, Any]:
    """Resolve the recipe of a run begun with an earlier version: missing options count as their defaults, and spellings are current.

    A recipe that this version does not accept is returned as it is, so that its comparison names the option.
    """
    try:
        return plain(assemble(recipe))
    except OptionError:
        return recipe


def lock(config: Config) -> IO[str]:
    """Lock the run folder while the returned file is open; the system releases it when the process ends in any way.

    Raises:
        OptionError: another process trains in this folder, or it cannot be written.
    """
    try:
        return hold(Path(config.run_dir) / ".lock", wait=False)
    except BlockingIOError:
        raise OptionError(f"another process is training in {config.run_dir}: wait for it, stop it, or choose another run_dir") from None
    except (OSError, ValueError) as error:
        raise OptionError(f"run_dir {config.run_dir!r} cannot be written: {error}. Choose another run_dir") from error


def write_recipe(config: Config, environment: dict[str, Any]) -> None:
    """Write config.yaml: the resolved recipe and its environment."""
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(plain(config) | {"environment": environment}, sort_keys=False, allow_unicode=True)
    write_atomically(folder / RECIPE, text)
