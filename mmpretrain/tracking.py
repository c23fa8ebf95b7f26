"""What a run leaves behind: JSON lines, TensorBoard events, images, and one console line that says how it goes."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import unicodedata
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from torch import Tensor


def plain(text: object) -> str:
    """`text` without control characters: a caption or a key from a stranger's shard must not drive the terminal."""
    kept = (" " if c in "\n\t\r" or unicodedata.category(c) in ("Zl", "Zp") else c for c in str(text))
    return "".join(c for c in kept if unicodedata.category(c) not in ("Cc", "Cf", "Cs"))


def file_name(name: str, step: int | None) -> str:
    """A name that stays inside its folder: "clip/views" at step 40 -> "clip_views-00000040"; step None -> "clip_views-final"."""
    stem = re.sub(r"[^A-Za-z0-9_.@-]+", "_", name).strip(".") or "_"
    return f"{stem}-{step:08d}" if step is not None else f"{stem}-final"


def jsonable(value: Any) -> Any:
    """Tensors and NumPy values as Python ones, bytes in base64, and NaN or infinity as None: JSON knows none of these."""
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(v) for v in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)


class LogError(ValueError):
    """A line of a run's own files that says nothing. The message names file, line and remedy."""


class JsonLines:
    """A file of JSON objects, one a line, written so that a crash can tear the last line only."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._mended = False

    def append(self, record: Mapping[str, Any]) -> None:
        """One write per line. Raises OSError, with the file as it was before, when the line does not fit on the disk."""
        line = (json.dumps(jsonable(record), ensure_ascii=False) + "\n").encode("utf-8", "replace")
        if not self._mended:
            self._mend()
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(file).st_size
            try:
                written = os.write(file, line)
            except OSError:
                os.ftruncate(file, size)
                raise
            if written < len(line):
                os.ftruncate(file, size)
                raise OSError(f"{self.path}: {written} of {len(line)} bytes of a line were written; is the disk full?")
        finally:
            os.close(file)

    def truncate_after(self, step: int) -> None:
        """Keep the lines whose `step` is null or at most `step`; drop the rest, and a torn last line. For resuming."""
        if not self.path.exists():
            return
        records = read_jsonl(self.path)
        if wrong := [r for r in records if not isinstance(r.get("step"), int | None)]:
            raise LogError(f"{self.path}: a line's step is {wrong[0]['step']!r:.60}, expected a number. Delete that line to go on.")
        kept = [r for r in records if r.get("step") is None or r["step"] <= step]
        temporary = self.path.with_name(self.path.name + ".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)

    def _mend(self) -> None:
        """Cut a torn last line, else the next line would be glued to it and both lost."""
        self._mended = True
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end == len(data):
            return
        with self.path.open("r+b") as file:
            if _record(data[end:]) is None:
                file.truncate(end)
            else:  # whole, but without its newline: an editor wrote it
                file.seek(len(data))
                file.write(b"\n")


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def read_jsonl(path: str | Path, strict: bool = True) -> list[dict[str, Any]]:
    """The records of a JSON lines file; [] if it does not exist. A torn last line is left out.

    Any other line that is not a JSON object raises LogError naming file and line, or is left out with a warning if not `strict`.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = _record(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):  # the last piece has no newline behind it: torn by a crash
            problem = f"{path}, line {number}: expected a JSON object, found {line[:60]!r}"
            if strict:
                raise LogError(f"{problem}. Delete that line to go on.")
            warnings.warn(f"{problem}; left out", stacklevel=2)
    return records


def latest_results(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The last line of each (evaluator, name, dataset), in order of first appearance."""
    last: dict[tuple, dict[str, Any]] = {}
    for line in lines:
        last[tuple(str(line.get(k)) for k in ("evaluator", "name", "dataset"))] = dict(line)
    return list(last.values())


def duration(seconds: float) -> str:
    """3723 -> "1:02:03"."""
    minutes, s = divmod(int(max(seconds, 0)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"


class Progress:
    """One live console line; where the output is no terminal, a plain line at most every `every_s` seconds."""

    def __init__(self, total_steps: int, console: Console | None = None, every_s: float = 10.0):
        self.total_steps, self.every_s = total_steps, every_s
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._printed_at = -math.inf

    def update(self, step: int, losses: Mapping[str, float], samples_per_s: float, wait_share: float, step_s: float) -> None:
        """`wait_share` in 0..1: the part of the step's `step_s` seconds that it waited for data."""
        parts = [f"step {step}/{self.total_steps}"]
        parts += [f"{plain(name)} {value:.4g}" for name, value in losses.items()]
        parts += [f"{samples_per_s:.0f} samples/s", f"data wait {wait_share:.0%}", f"ETA {duration((self.total_steps - step) * step_s)}"]
        line = "  ".join(parts)
        if self.console.is_terminal:
            if self._live is None:
                self._live = Live(console=self.console, auto_refresh=False)
                self._live.start()
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
            return
        now = self.console.get_time()
        if now - self._printed_at >= self.every_s or step >= self.total_steps:
            self._printed_at = now
            self.print(line)

    def print(self, item: str | Table) -> None:
        """Above the live line. Strings are cleaned line by line, and their square brackets are no markup."""
        self.console.print(Text("\n".join(plain(line) for line in item.split("\n"))) if isinstance(item, str) else item)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def console_table(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> Table:
    """Rows of any columns; a row of results.jsonl gives one line per metric. Nothing in it is markup."""
    lines = [line for row in rows for line in _by_metric(row)]
    columns = list(dict.fromkeys(k for line in lines for k in line))
    table = Table(title=Text(plain(title)) if title else None)
    for column in columns:
        table.add_column(Text(plain(column)), overflow="fold")
    for line in lines:
        cells = (line.get(c) for c in columns)
        table.add_row(*(Text("" if v is None else f"{v:.4f}" if isinstance(v, float) else plain(v)) for v in cells))
    return table


def _by_metric(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if not isinstance(row.get("metrics"), Mapping):
        return [row]
    who = {k: v for k, v in row.items() if k not in ("metrics", "model", "seed", "baselines")}  # what tells the lines apart
    return [{**who, "metric": metric, "value": value} for metric, value in row["metrics"].items()]


class Tracker:
    """Writes what happens in a run to its folder; on ranks other than the main one every method does nothing.

    resume_step: the step of the checkpoint that was loaded: everything a dead run logged after it is cut away, so that the files
        are those of an undisturbed run. None: nothing was loaded; only lines without a step are kept.
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
        self._steps, self._wait, self._time = 0, 0.0, 0.0  # since that line
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
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only the main rank needs it

        self._board = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=keep + 1)
        self._progress = Progress(total_steps, console)

    def due(self, step: int) -> bool:
        """Whether `log` writes at this step: the first, the last, and every `log_every`-th."""
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
        """Call it every step. Scalars ("loss", "clip/loss", ...) are read, hence synchronised, when a line is due, or `always`.

        data_wait_s, step_s: seconds that this step waited for data, and took altogether; the line has the means since the last line.
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
        """A line of scalars that are not measured at every logged step."""
        if self.is_main:
            self._files["metrics"].append({"step": step, "samples_seen": samples_seen, **scalars})
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)

    def result(self, step: int | None, line: Mapping[str, Any]) -> None:
        """One evaluator's line: {"evaluator", "name", "dataset", "model", "n", "seed", "metrics": {...}}."""
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

    def skipped(self, step: int, records: Iterable[Mapping[str, Any]]) -> None:
        """Records {source, shard, key, reason} of all ranks: the caller gathers them."""
        if self.is_main:
            for record in records:
                self._files["skipped"].append({"step": step, **record})

    def images(self, step: int, name: str, grid: Tensor) -> None:
        """grid: float [3, H, W] in 0..1, to TensorBoard and images/NAME-STEP.png."""
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
        if self.is_main:
            self._progress.print(text)

    def table(self, rows: Sequence[Mapping[str, Any]], title: str = "Results") -> None:
        """Lines of results.jsonl, shown metric by metric, or rows of anything else."""
        if self.is_main:
            self._progress.print(console_table(rows, title))

    def close(self) -> None:
        if self.is_main:
            self._progress.close()
            self._board.close()


def view_grid(rows: Sequence[Tensor], mean: Sequence[float], std: Sequence[float], pad: int = 2) -> Tensor:
    """Each entry of `rows`, normalised [n, 3, h, w], becomes one row of the picture: float [3, H, W] in 0..1.

    Rows may differ in n, h and w (multi-crop): smaller images lie at the top left of a cell of the largest size.
    """
    m, s = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    if not rows or any(r.ndim != 4 or r.shape[1] != 3 for r in rows):
        raise ValueError(f"expected one or more tensors [n, 3, h, w], found shapes {[tuple(r.shape) for r in rows]}")
    height, width = max(r.shape[2] for r in rows) + pad, max(r.shape[3] for r in rows) + pad
    grid = torch.ones(3, pad + len(rows) * height, pad + max(len(r) for r in rows) * width)
    for i, row in enumerate(rows):
        for j, image in enumerate(row.detach().float().cpu()):
            y, x = pad + i * height, pad + j * width
            grid[:, y : y + image.shape[1], x : x + image.shape[2]] = (image * s + m).nan_to_num(0.0).clamp(0, 1)
    return grid


def reconstruction_grid(image: Tensor, masked: Tensor, prediction: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Masked image modelling: [n, 3, H, W] each, normalised -> one column per sample; rows: original, masked input, reconstruction."""
    if not image.shape == masked.shape == prediction.shape:
        raise ValueError(f"expected three equal shapes, found {tuple(image.shape)}, {tuple(masked.shape)}, {tuple(prediction.shape)}")
    return view_grid([image, masked, prediction], mean, std)
