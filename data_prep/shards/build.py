"""Parallel builds of shards from tasks: reproducible byte for byte, atomic, resumable, and indexed with checksums."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_prep import files
from data_prep.engine import run
from data_prep.files import write_json
from data_prep.records import InputError, OutputError, Record, RecordError, Skipped, Split
from data_prep.shards.serial import write_shards
from data_prep.shards.tar_writer import MANIFEST, SIZES, manifest_of
from data_prep.shards.task import UNFINISHED, Done, Job, digest_of, index_keys, key_digest, part_folder
from mmpretrain.system import hold

__all__ = ["InputError", "Record", "Skipped", "Split", "build", "write_json", "write_shards"]

SKIPPED = "skipped.jsonl"
PLAN = "plan.json"
CLASSES = "classnames.txt"
HOLDOUT_PARTS = ("train", "holdout")  # folders of a build with --holdout


def build(
    out: str | Path,
    produce: Callable[[Any], Iterator[Record | Skipped]],
    tasks: Iterable[Any],
    *,
    plan: dict[str, Any],
    max_bytes: int = 1 << 30,
    engine: str = "local",
    processes: int | None = None,
    command: str | None = None,
    licence: str | None = None,
    allow_skipped: bool = True,
    split: Split | None = None,
    texts: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Writes the records of `produce(task)` to OUT: task i to {i:05d}.tar, and {i:05d}-01.tar ... beyond `max_bytes`.

    Each shard gets an index with a checksum per member. A finished build also has sizes.json, manifest.json and, where
    inputs were left out, skipped.jsonl. The same tasks give the same bytes with any engine, number of processes and
    interruptions. A shard receives its final name once it is complete. Called again with the same tasks and plan, an
    interrupted build does the remaining tasks, and a finished one does nothing.

    Args:
        out: a folder or fsspec URL, new or holding an unfinished build of the same tasks and plan.
        produce: see `engine.run`.
        tasks: a build is identified by their reprs and that of `plan`.
        plan: the options that determine the records.
        max_bytes: limit of a shard; a task beyond it continues in another shard.
        engine: see `engine.run`.
        processes: see `engine.run`.
        command: the command line, for the manifest.
        licence: of the data, for the manifest.
        allow_skipped: if false, the first Skipped is an InputError.
        split: assigns each record to one of `split.parts`, folders of OUT that are shard sets of their own.
        texts: further files of each shard set, by name.

    Returns:
        The manifest; with `split`, the sum of the parts' manifests, with each of them under "parts".

    Raises:
        OutputError: OUT holds anything else.
        RecordError: a key is repeated or unsafe.
        InputError: an input cannot be used, and `allow_skipped` is false.
    """
    out = str(files.place(out))
    if out.startswith("memory://"):  # exists in this process only
        engine, processes = "local", 1
    plan_digest = digest_of(json.dumps(plan, sort_keys=True, default=repr), max_bytes, split)
    parts = split.parts if split else ("",)
    job = Job(out, produce, plan_digest, max_bytes, allow_skipped, split)
    _clear_empty(out, parts)
    if _finished(out, parts):
        manifest = _finished_manifest(out, parts, job, tasks)
        if isinstance(files.place(out), Path):
            shutil.rmtree(files.join(out, UNFINISHED), ignore_errors=True)  # left by a kill in the last moment
        return manifest
    with _locked(out, plan_digest), tempfile.TemporaryFile("w+", encoding="utf-8", errors="surrogatepass") as skipped:
        with closing(run(job, enumerate(tasks), engine=engine, processes=processes, title="shards")) as results:
            manifests = _gather(results, out, parts, plan_digest, skipped, command, licence)
        for part, manifest in manifests.items():
            folder = part_folder(out, part)
            files.make_folder(folder)
            for name, text in (texts or {}).items():
                files.write_text(files.join(folder, name), text)
            write_json(files.join(folder, SIZES), {name: shard["count"] for name, shard in manifest["shards"].items()})
            write_json(files.join(folder, MANIFEST), manifest)
    return _sum(manifests)


def _finished(out: str, parts: tuple[str, ...]) -> bool:
    if files.exists(files.join(files.join(out, UNFINISHED), PLAN)):
        return False
    return all(files.exists(files.join(part_folder(out, part), MANIFEST)) for part in parts)


def _read_object(name: str, out: str) -> dict[str, Any]:
    """Reads a JSON object of a build. Raises OutputError where it is damaged: the build cannot be identified."""
    try:
        content = json.loads(files.read_bytes(name))
        if not isinstance(content, dict):
            raise ValueError("expected an object")
        return content
    except ValueError as error:
        raise OutputError(f"{name} is damaged ({error}). Delete {out} and build again, or choose another --out.") from error


def _finished_manifest(out: str, parts: tuple[str, ...], job: Job, tasks: Iterable[Any]) -> dict[str, Any]:
    """Returns the manifest of a finished build. Raises OutputError for a build of other tasks, or with a missing shard."""
    build_digest = _total(job.plan, (job.task_digest(numbered) for numbered in enumerate(tasks)))
    manifests = {}
    for part in parts:
        folder = part_folder(out, part)
        manifest = _read_object(files.join(folder, MANIFEST), out)
        if manifest.get("build") != build_digest:
            raise OutputError(
                f"{folder} exists and holds other samples than these inputs give, or an input has changed since. "
                "Choose another --out, or delete the old build."
            )
        for name, shard in manifest["shards"].items():
            if files.size(files.join(folder, name)) != shard["bytes"]:
                raise OutputError(f"{files.join(folder, name)} is gone or has changed since it was built. Delete {out} and build again.")
        manifests[part] = manifest
    return _sum(manifests)


@contextmanager
def _locked(out: str, plan_digest: str) -> Iterator[None]:
    """Locks OUT, records the plan, and on success removes the state of the unfinished build.

    Raises OutputError where OUT holds something else, or another process builds there.
    """
    files.make_folder(out)
    state = files.join(out, UNFINISHED)
    plan = files.join(state, PLAN)
    begun = files.exists(plan)
    if not begun and (others := [name for name in files.listing(out) if name != state]):
        raise OutputError(
            f"{out} is not empty ({others[0]}) and holds no unfinished build of ours. Choose another --out, or empty the folder."
        )
    files.make_folder(state)
    local = isinstance(files.place(out), Path)
    try:
        lock = hold(Path(state) / "lock", wait=False) if local else None
    except BlockingIOError:
        raise OutputError(f"another process is building in {out}. Wait for it, or choose another --out.") from None
    try:
        if begun and _read_object(plan, out).get("plan") != plan_digest:
            if _has_shards(out):
                raise OutputError(f"{out} holds an unfinished build of other inputs or options. Choose another --out, or delete it.")
            for name in files.listing(state):  # it failed before it wrote anything: its command has been corrected
                if name.endswith(".json"):
                    files.remove(name)
        files.write_json(plan, {"plan": plan_digest})
        _sweep(out)
        yield
        for name in files.listing(state):
            if not name.endswith((PLAN, "lock")):
                files.remove(name)
        files.remove(plan)  # from here on the build is finished
        if local:
            shutil.rmtree(state, ignore_errors=True)
    finally:
        _sweep(out)
        if lock is not None:
            lock.close()


def _has_shards(out: str) -> bool:
    """Returns whether OUT, or a folder of it, holds a shard."""
    inside = files.listing(out)
    folders = [name for name in inside if "." not in name.rpartition("/")[2] and not name.endswith(f"/{UNFINISHED}")]
    return any(name.endswith(".tar") for name in (*inside, *(name for folder in folders for name in files.listing(folder))))


def _clear_empty(out: str, parts: tuple[str, ...]) -> None:
    """Removes a finished build without any sample, so that its corrected command can write there."""
    folders = sorted({out, *(part_folder(out, part) for part in (*parts, *HOLDOUT_PARTS))})
    manifests = [name for folder in folders if files.exists(name := files.join(folder, MANIFEST))]
    if not manifests or _has_shards(out) or any(_read_object(name, out).get("num_samples") != 0 for name in manifests):
        return
    for folder in folders:
        for name in files.listing(folder):
            if name.rpartition("/")[2] in (MANIFEST, SIZES, SKIPPED, CLASSES):
                files.remove(name)
        if folder != out and isinstance(where := files.place(folder), Path) and where.is_dir() and not any(where.iterdir()):
            where.rmdir()


def _sweep(out: str) -> None:
    """Removes temporary files of killed processes."""
    if isinstance(where := files.place(out), Path):
        for leftover in where.rglob("*.tmp-*"):
            leftover.unlink(missing_ok=True)


def _total(plan_digest: str, tasks: Iterable[str]) -> str:
    """Digests the whole build: the plan, and the tasks in order."""
    digest = plan_digest
    for task in tasks:
        digest = digest_of(digest, task)
    return digest


def _gather(
    results: Iterator[Done], out: str, parts: tuple[str, ...], plan_digest: str, skipped: IO[str], command: str | None, licence: str | None
) -> dict[str, dict[str, Any]]:
    """Collects the manifest of each part, and writes skipped.jsonl. Raises RecordError for a repeated key."""
    shards: dict[str, dict[str, dict[str, Any]]] = {part: {} for part in parts}
    keys: list[np.ndarray] = []
    reasons: Counter[str] = Counter()

    def tasks() -> Iterator[str]:
        for done in results:
            for part, written in done.shards.items():
                shards[part].update(written)
            keys.append(done.keys)
            for item in done.skipped:
                record = {"input": item.where, "reason": item.reason, "detail": item.detail}
                skipped.write(json.dumps(record, ensure_ascii=False) + "\n")
                reasons[item.reason] += 1
            yield done.task

    build_digest = _total(plan_digest, tasks())
    _check_no_other_shards(shards, out)
    _check_unique(keys, [files.join(part_folder(out, part), name) for part in parts for name in shards[part]])
    left_out = reasons.total()
    more = {"reasons": dict(sorted(reasons.items()))} if left_out else {}
    if left_out:
        skipped.seek(0)
        files.write_lines(files.join(out, SKIPPED), skipped)
    manifests = {}
    for part in parts:
        members: Counter[str] = Counter()
        for shard in shards[part].values():
            members.update(shard["members"])
        manifests[part] = manifest_of(shards[part], members, command, licence, skipped=left_out, **more, build=build_digest)
    return manifests


def _check_no_other_shards(shards: dict[str, dict[str, dict[str, Any]]], out: str) -> None:
    """Raises OutputError for a shard in OUT that is not part of this build: readers would include it."""
    for part, written in shards.items():
        present = [name for name in files.listing(part_folder(out, part)) if name.endswith(".tar")]
        extra = [name for name in present if name.rpartition("/")[2] not in written]
        if extra:
            raise OutputError(
                f"{extra[0]} is not of this build. Did an input change after the build had been stopped? Delete {out} and build again."
            )


def _check_unique(keys: list[np.ndarray], shards: list[str]) -> None:
    """Raises RecordError for a repeated key; keys whose digests collide are compared themselves."""
    digests = np.concatenate([np.zeros(0, np.uint64), *keys])
    keys.clear()  # the only memory that grows with the corpus: eight bytes a sample
    digests.sort()
    repeated = {digest.tobytes() for digest in digests[1:][digests[1:] == digests[:-1]]}
    seen: dict[str, str] = {}
    for shard in shards if repeated else ():
        for key in index_keys(shard):
            if key_digest(key) not in repeated:
                continue
            if key in seen:
                raise RecordError(f"key {key!r} comes twice, in {seen[key]} and {shard}: keys must be unique over the whole data set")
            seen[key] = shard


def _sum(manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if list(manifests) == [""]:
        return manifests[""]
    members: Counter[str] = Counter()
    for manifest in manifests.values():
        members.update(manifest["members"])
    shards = {f"{part}/{name}": shard for part, manifest in manifests.items() for name, shard in manifest["shards"].items()}
    first = next(iter(manifests.values()))
    more = {name: first[name] for name in ("skipped", "reasons", "build") if name in first}
    return manifest_of(shards, members, first["command"], first["licence"], **more, parts=manifests)
