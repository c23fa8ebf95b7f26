"""The tracker of a run: metrics.jsonl, results.jsonl, skipped.jsonl, TensorBoard events, pictures and the console."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from mmpretrain.tracking.console import Progress, console_table
from mmpretrain.tracking.jsonl import JsonLines, file_name, read_jsonl


class Tracker:
    """Writes the events of a run to its folder; on ranks other than the main one every method does nothing.

    Args:
        run_dir: the run folder.
        log_every: steps between lines of metrics.jsonl.
        total_steps: of the run.
        is_main: this is the main rank.
        resume_step: step of the loaded checkpoint: lines and pictures of later steps are removed, so that the files
            are those of an uninterrupted run. None: nothing was loaded; only lines without a step are kept.
        console: to print to.
    """

    def __init__(
        self,
        run_dir: str | Path,
        log_every: int,
        total_steps: int,
        is_main: bool = True,
        resume_step: int | None = None,
        console: Console | None = None,
    ):
        if log_every < 1:
            raise ValueError(f"log_every is {log_every}; expected 1 or more")
        self.run_dir, self.log_every, self.total_steps, self.is_main = Path(run_dir), log_every, total_steps, is_main
        self._last = (0, 0)  # step, samples_seen of the last line written
        self._steps, self._wait, self._time = 0, 0.0, 0.0  # steps and seconds since that line
        if not is_main:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        keep = -1 if resume_step is None else resume_step
        self._files = {name: JsonLines(self.run_dir / f"{name}.jsonl") for name in ("metrics", "results", "skipped")}
        for file in self._files.values():
            file.truncate_after(keep)
        for path in (*self.run_dir.glob("images/*.png"), *self.run_dir.glob("report/*")):
            stamp = re.search(r"-(\d{8,})\b", path.name)
            if stamp and int(stamp[1]) > keep:
                path.unlink()
        if before := read_jsonl(self.run_dir / "metrics.jsonl"):
            self._last = (before[-1].get("step") or 0, before[-1].get("samples_seen") or 0)
        from torch.utils.tensorboard import SummaryWriter  # slow to import; only the main rank needs it

        self._board = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=keep + 1)
        self._progress = Progress(total_steps, console)

    def due(self, step: int) -> bool:
        """Return whether `log` writes at this step: the first, the last, and every `log_every`-th."""
        return step == 1 or step == self.total_steps or step % self.log_every == 0

    def log(
        self,
        step: int,
        samples_seen: int,
        scalars: Mapping[str, float | Tensor],
        data_wait_s: float,
        step_s: float,
        lr: float,
        always: bool = False,
    ) -> None:
        """Record a step; call it at every step. A line with means since the last one is written when due, or `always`.

        Args:
            step: number of steps made.
            samples_seen: in all steps.
            scalars: "loss", "clip/loss", ...; read, hence synchronised, only when a line is written.
            data_wait_s: seconds that this step waited for data.
            step_s: seconds of this step.
            lr: peak learning rate.
            always: write a line now.
        """
        if not self.is_main:
            return
        self._steps, self._wait, self._time = self._steps + 1, self._wait + data_wait_s, self._time + step_s
        if not (always or self.due(step)):
            return
        wait, took = self._wait / self._steps, self._time / self._steps
        steps, samples = step - self._last[0], samples_seen - self._last[1]
        rate = samples / (steps * took) if steps > 0 and took > 0 else 0.0
        self._last, self._steps, self._wait, self._time = (step, samples_seen), 0, 0.0, 0.0
        values = {name: float(value) for name, value in scalars.items()}
        line = {"step": step, "samples_seen": samples_seen, **values}
        line |= {"samples_per_s": round(rate, 3), "data_wait_s": round(wait, 6), "step_s": round(took, 6), "lr": float(lr)}
        self._files["metrics"].append(line)
        for name, value in line.items():
            if name != "step":
                self._board.add_scalar(name, value, step)
        losses = {k.removesuffix("/loss"): v for k, v in values.items() if k == "loss" or k.endswith("/loss")}
        self._progress.update(step, losses, rate, wait / took if took > 0 else 0.0, took)

    def extra(self, step: int, samples_seen: int, scalars: Mapping[str, float]) -> None:
        """Write a line of scalars that are not measured at every logged step."""
        if self.is_main:
            self._files["metrics"].append({"step": step, "samples_seen": samples_seen, **scalars})
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)

    def result(self, step: int | None, line: Mapping[str, Any]) -> None:
        """Write an evaluator's line: {"evaluator", "name", "dataset", "model", "n", "seed", "metrics": {...}}."""
        if not self.is_main:
            return
        line = {"step": step, **{k: v for k, v in line.items() if k != "step"}}
        self._files["results"].append(line)
        name = str(line.get("name") or line.get("evaluator"))
        metrics = {k: float(v) for k, v in line.get("metrics", {}).items() if isinstance(v, int | float)}
        for metric, value in metrics.items():
            self._board.add_scalar(f"{name}/{metric}", value, self.total_steps if step is None else step)
        shown = "  ".join(f"{metric} {value:.4f}" for metric, value in metrics.items())
        when = "" if step is None else f" at step {step}"
        self._progress.print(f"{name}{when}, n = {line.get('n')}: {shown}")

    def skipped(self, step: int, records: Iterable[Mapping[str, Any]], ending: bool = False) -> None:
        """Write records {source, shard, key, reason} of all ranks, which the caller gathers; a rank `ending` the run writes its own."""
        if self.is_main or ending:
            file = self._files["skipped"] if self.is_main else JsonLines(self.run_dir / "skipped.jsonl")
            for record in records:
                file.append({"step": step, **record})

    def images(self, step: int, name: str, grid: Tensor) -> None:
        """Write a picture, float [3, H, W] in 0..1, to TensorBoard and images/NAME-STEP.png."""
        if not self.is_main:
            return
        from PIL import Image

        pixels = (grid.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()  # [3, H, W]
        self._board.add_image(name, pixels, step)
        folder = self.run_dir / "images"
        folder.mkdir(exist_ok=True)
        path = folder / f"{file_name(name, step)}.png"
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path.with_suffix(".tmp"), format="PNG", optimize=True)
        path.with_suffix(".tmp").replace(path)

    def message(self, text: str) -> None:
        """Print a message."""
        if self.is_main:
            self._progress.print(text)

    def table(self, rows: Sequence[Mapping[str, Any]], title: str = "Results") -> None:
        """Print lines of results.jsonl, one per metric, or rows of any other columns."""
        if self.is_main:
            self._progress.print(console_table(rows, title))

    def close(self) -> None:
        """Close the console line and TensorBoard."""
        if self.is_main:
            self._progress.close()
            self._board.close()
