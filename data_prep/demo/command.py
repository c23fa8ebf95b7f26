"""The demo benchmark's shards: `python -m data_prep demo OUT`, and `ensure_demo` for a first run. docs/demo.md states the benchmark.

Each split is a folder of OUT, written beside its final name and renamed when whole; `demo.json` in it says which generator, seed and count
made it, so what is there already is kept and what another generator made is replaced.
"""

from __future__ import annotations

import json
import os
import pickle
import queue
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from data_prep.demo.captions import TEMPLATES
from data_prep.demo.records import chunk
from data_prep.demo.scenes import CLASS_NAMES, GENERATOR_VERSION, NUM_TRAINED, SPLITS
from data_prep.files import local_folder
from data_prep.records import Record
from data_prep.shards.serial import write_shards
from mmpretrain.machine import cores

MARK = "demo.json"
SCENES_PER_JOB = 250
SCENES_PER_SHARD = 3000
SCENES_PER_PROCESS = 1000  # fewer are not worth starting a process for


def class_names(split: str) -> tuple[str, ...]:
    """The names zero-shot classification chooses from: all classes for held-out ones, else those trained on. Index = `cls`."""
    return CLASS_NAMES if SPLITS[split].held_out else CLASS_NAMES[:NUM_TRAINED]


def module_command(module: str) -> tuple[list[str], dict[str, str]]:
    """(command, environment) that run a module of this package, wherever this process stands."""
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    return [sys.executable, "-m", module], {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _start() -> subprocess.Popen:
    """A rendering process. It starts from `records` alone: a `multiprocessing` child would first import the whole calling script,
    torch included, which takes longer than much of the rendering."""
    command, environment = module_command("data_prep.demo.records")
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def _ask(idle: queue.SimpleQueue, job: tuple[int, str, int, int]) -> list[tuple[str, dict[str, bytes]]]:
    """Have an idle process render one job. Raises RuntimeError where that process has died."""
    process = idle.get()
    try:
        pickle.dump(job, process.stdin)
        process.stdin.flush()
        return pickle.load(process.stdout)
    except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
        raise RuntimeError(
            f"a rendering process died (exit status {process.wait()}) at scenes {job[2]} to {job[3]} of {job[1]!r}; its error, if any, "
            "is above. If memory ran out, try one process (--processes 1)."
        ) from error
    finally:
        idle.put(process)


def _records(seed: int, split: str, count: int, processes: int) -> Iterator[Record]:
    """Scenes in order, rendered by so many processes with a bounded number of jobs ahead; by this one if 1."""
    jobs = [(seed, split, start, min(start + SCENES_PER_JOB, count)) for start in range(0, count, SCENES_PER_JOB)]
    if processes == 1:
        for job in jobs:
            yield from (Record(key, members) for key, members in chunk(job))
        return
    idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
    started = [_start() for _ in range(processes)]
    for process in started:
        idle.put(process)
    pool, ahead = ThreadPoolExecutor(processes), deque()
    try:
        for job in jobs:
            ahead.append(pool.submit(_ask, idle, job))
            if len(ahead) > 4 * processes:
                yield from (Record(key, members) for key, members in ahead.popleft().result())
        while ahead:
            yield from (Record(key, members) for key, members in ahead.popleft().result())
    finally:
        pool.shutdown(cancel_futures=True)
        for process in started:
            process.kill()  # it holds nothing but the next job
            process.wait()
            process.stdout.close()
            with suppress(BrokenPipeError):  # a job that it never read
                process.stdin.close()


def _mark(seed: int, split: str, count: int) -> dict[str, object]:
    return {"generator_version": GENERATOR_VERSION, "seed": seed, "split": split, "count": count}


def _found(folder: Path) -> dict[str, object] | None:
    """What made this split; None where it is absent. Raises FileExistsError where something else lies there."""
    if not folder.exists():
        return None
    try:
        return json.loads((folder / MARK).read_text())
    except (FileNotFoundError, ValueError) as error:
        raise FileExistsError(
            f"{folder} exists but has no readable {MARK}, so this command did not write it and will not replace it. "
            "Choose another folder, or move that one away."
        ) from error


def _write_split(root: Path, seed: int, split: str, count: int, processes: int) -> None:
    final, temporary = root / split, root / f".{split}.tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write_shards(
            _records(seed, split, count, processes),
            temporary,
            max_count=SCENES_PER_SHARD,
            command=f"python -m data_prep demo OUT --seed {seed} --split {split}",
            licence="generated by this project (Apache-2.0)",
        )
        if SPLITS[split].text and split != "binding":
            (temporary / "classnames.txt").write_text("\n".join(class_names(split)) + "\n")
        if templates := SPLITS[split].templates:
            (temporary / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES[templates]) + "\n")
        (temporary / MARK).write_text(json.dumps(_mark(seed, split, count)) + "\n")
        if final.exists():
            shutil.rmtree(final)
        os.rename(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def unwritten(
    root: Path | str, seed: int = 0, *, splits: Sequence[str] | None = None, counts: Mapping[str, int] | None = None
) -> list[str]:
    """Which of these splits (all by default) `ensure_demo` would write. Raises as it does."""
    counts = counts or {}
    wanted = list(splits or SPLITS)
    for name in [*wanted, *counts]:
        if name not in SPLITS:
            raise ValueError(f"no demo split {name!r}; there are {', '.join(SPLITS)}")
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"split {name!r}: {count} scenes asked for; at least 1 is needed")
    if seed < 0:
        raise ValueError(f"seed {seed}: demo seeds are 0 or greater")
    return [name for name in wanted if _found(Path(root) / name) != _mark(seed, name, counts.get(name, SPLITS[name].count))]


def ensure_demo(
    root: Path | str,
    seed: int = 0,
    *,
    splits: list[str] | None = None,
    counts: Mapping[str, int] | None = None,
    processes: int | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Write the demo splits under `root` unless they are there, of this generator version, seed and size; returns `root`.

    splits: names from SPLITS, all by default. counts: scenes per split, where not the benchmark's own number. processes: one per core by
    default. say: receives progress lines.

    Raises ValueError for an unknown split or count or a URL, FileExistsError where a split's folder was not written by this generator.
    """
    root, counts = local_folder(root), dict(counts or {})
    missing = unwritten(root, seed, splits=splits, counts=counts)
    total = {name: counts.get(name, SPLITS[name].count) for name in missing}
    if missing:
        root.mkdir(parents=True, exist_ok=True)
        say(f"writing demo shards to {root}: " + ", ".join(f"{name} {total[name]:,}" for name in missing))
    for name in missing:
        start = time.perf_counter()
        most = max(1, min(processes or cores(), 16, total[name] // SCENES_PER_PROCESS))
        _write_split(root, seed, name, total[name], most)
        say(f"  {name}: {total[name]:,} scenes in {time.perf_counter() - start:.1f} s")
    return root


def demo(
    out: Annotated[Path, typer.Argument(help="folder to write the splits into")],
    seed: Annotated[int, typer.Option(help="other seeds give other scenes of the same distribution", min=0)] = 0,
    split: Annotated[list[str] | None, typer.Option(help="write only this split; may be repeated")] = None,
    pairs: Annotated[int, typer.Option(help="scenes in `pairs`", min=1)] = SPLITS["pairs"].count,
    photos: Annotated[int, typer.Option(help="scenes in `photos`", min=1)] = SPLITS["photos"].count,
    test: Annotated[int, typer.Option(help="scenes in `test`", min=1)] = SPLITS["test"].count,
    processes: Annotated[int | None, typer.Option(help="worker processes; default: the number of cores", min=1)] = None,
    check: Annotated[
        bool, typer.Option(help="also look for duplicates between training and test splits, and measure the baselines")
    ] = False,
) -> None:
    """Write the demo benchmark: rendered scenes of shapes with captions (see docs/demo.md)."""
    start = time.perf_counter()
    try:
        ensure_demo(out, seed, splits=split, counts={"pairs": pairs, "photos": photos, "test": test}, processes=processes, say=typer.echo)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(f"demo shards of generator version {GENERATOR_VERSION}, seed {seed}, in {out} ({time.perf_counter() - start:.1f} s)")
    if check:
        from data_prep.demo.checks import duplicates, nearest_neighbour_baselines

        typer.echo(json.dumps({"duplicates": duplicates(out), "baselines": nearest_neighbour_baselines(out)}, indent=1))
