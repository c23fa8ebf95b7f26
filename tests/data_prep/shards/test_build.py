"""Shards are written whole, the same each time, and never over something else."""

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from data_prep import files
from data_prep.records import InputError, Record
from data_prep.shards import build as writer
from data_prep.shards import serial, tar_writer
from data_prep.shards.build import build
from data_prep.shards.serial import write_shards
from data_prep.shards.tar_writer import ShardFile, header
from mmpretrain.data.index import index_path, load, scan
from mmpretrain.system import hold
from tests.data_prep import jobs


def records(count: int = 7) -> list[Record]:
    return [Record(f"k{i}", {"jpg": bytes([i]) * (100 * i), "txt": f"number {i}".encode()}) for i in range(count)]


def tree(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_what_is_written(tmp_path: Path) -> None:
    out = tmp_path / "s"
    manifest = write_shards(records(), out, max_count=3, command="build", licence="CC0")
    assert sorted(p.name for p in out.glob("*.tar")) == ["00000.tar", "00001.tar", "00002.tar"]
    assert json.loads((out / "sizes.json").read_text()) == {"00000.tar": 3, "00001.tar": 3, "00002.tar": 1}
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert (manifest["num_samples"], manifest["members"], manifest["licence"]) == (7, {"jpg": 7, "txt": 7}, "CC0")
    assert manifest["shards"]["00001.tar"]["sha256"] == tree(out)["00001.tar"]
    index, _ = load(index_path(out / "00001.tar"))
    assert index.members(2)["txt"].checksum == xxhash.xxh3_128(b"number 5").digest()
    assert not list(out.glob("*.tmp*")) + list(out.glob("unfinished*"))


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shards(records(), tmp_path / name, max_count=3)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_shards_keep_to_their_size(tmp_path: Path) -> None:
    write_shards([Record(f"{i}", {"jpg": b"x" * 1000}) for i in range(10)], tmp_path / "s", max_bytes=5000)
    assert json.loads((tmp_path / "s" / "sizes.json").read_text()) == {f"0000{i}.tar": 2 for i in range(5)}


@pytest.mark.parametrize("after", ["_write", "save"])
def test_a_killed_build_resumes_and_ends_the_same(after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(records(), tmp_path / "whole", max_count=2)
    holder = serial if after == "_write" else serial.shard_index
    real, calls = getattr(holder, after), []

    def killed(*args: object) -> object:
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(holder, after, killed)
    with pytest.raises(KeyboardInterrupt):
        write_shards(records(), tmp_path / "s", max_count=2)
    assert sorted(p.name for p in (tmp_path / "s").glob("*.tar")) == ["00000.tar", "00001.tar"]  # only whole shards have their name
    assert not (tmp_path / "s" / "manifest.json").exists()
    monkeypatch.undo()
    stamp = (tmp_path / "s" / "00001.tar").stat().st_mtime_ns
    write_shards(records(), tmp_path / "s", max_count=2)
    assert (tmp_path / "s" / "00001.tar").stat().st_mtime_ns == stamp  # kept, not written again
    assert tree(tmp_path / "s") == tree(tmp_path / "whole")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "s"
    write_shards(records(), out, max_count=3)
    before = tree(out)
    write_shards(records(), out, max_count=3)  # the same again is fine
    changed = [*records()[:4], Record("k4", {"jpg": b"other"}), *records()[5:]]
    for inputs, count in ((changed, 3), (records(9), 3), (records(3), 3), (records(), 4)):
        with pytest.raises(FileExistsError, match="Choose another --out"):
            write_shards(inputs, out, max_count=count)
    assert tree(out) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match="not empty"):
        write_shards(records(), tmp_path / "other")


@pytest.mark.parametrize("out", ["s3://bucket/set", Path("s3://bucket/set"), "memory://set"])
def test_a_url_is_refused_where_only_folders_are_written(out: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is a URL; this writes to a local folder only"):
        write_shards([Record("a", {"txt": b"a"})], out)
    assert list(tmp_path.iterdir()) == []
    write_shards([Record("a", {"txt": b"a"})], f"file://{tmp_path}/set")
    assert (tmp_path / "set" / "00000.tar").is_file()


@pytest.mark.parametrize("key", ["a.b", "../x", "/x", "a//b", "", "a b", "a\nb", "x" * 201, "a/../b", "con:x"])
def test_unsafe_keys_are_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="key"):
        write_shards([Record(key, {"txt": b""})], tmp_path / "s")


def test_duplicate_keys_and_odd_members_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'k0' comes twice"):
        write_shards([*records(3), records(1)[0]], tmp_path / "a", max_count=2)
    for members in ({}, {"JPG": b""}, {"a/b": b""}, {"": b""}):
        with pytest.raises(ValueError, match="key 'k'"):
            write_shards([Record("k", members)], tmp_path / "b")


def shards_of(out: Path) -> dict[str, dict[str, bytes]]:
    """Samples as tarfile and webdataset's naming see them."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                found.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return found


TASKS = [tuple(range(start, start + 25)) for start in range(0, 200, 25)]


def numbers(out: Path | str, tasks: list[tuple[int, ...]] = TASKS, **options: Any) -> dict[str, Any]:
    return build(out, jobs.records, tasks, **{"plan": {"of": "numbers"}, "processes": 1, **options})


KEYS = ["a", "ordner/ü-ß", "k" * 96, "k" * 97, "k" * 150, "d" * 90 + "/" + "e" * 60, "日本" * 30, "n-1"]


def test_the_tar_is_the_one_that_tarfile_writes(tmp_path: Path) -> None:
    made = [Record(key, {"jpg": bytes([i]) * (511 + i), "txt": b"", "seg.png": b"x" * 512}) for i, key in enumerate(KEYS)]
    file = ShardFile(tmp_path / "ours.tar")
    for record in made:
        file.add(record)
    index, digest = file.close()
    with tarfile.open(tmp_path / "theirs.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for record in made:
            for extension in sorted(record.members):
                info = tarfile.TarInfo(f"{record.key}.{extension}")
                info.size, info.mode = len(record.members[extension]), 0o644
                tar.addfile(info, io.BytesIO(record.members[extension]))
    data = (tmp_path / "ours.tar").read_bytes()
    assert data == (tmp_path / "theirs.tar").read_bytes()
    assert digest == hashlib.sha256(data).hexdigest()
    scanned = scan(tmp_path / "ours.tar")
    assert scanned.keys == index.keys == KEYS
    assert not scanned.damage
    for name in ("starts", "extension", "offset", "size"):
        assert (getattr(scanned, name) == getattr(index, name)).all()
    for sample, record in enumerate(made):
        assert {e: data[m.offset : m.offset + m.size] for e, m in index.members(sample).items()} == record.members
        assert all(m.checksum == xxhash.xxh3_128(record.members[e]).digest() for e, m in index.members(sample).items())


def test_bytes_reach_the_disk_in_order_however_little_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record of more parts than one call takes, calls that write only some of them, and the disk brought up to date meanwhile."""
    real = os.writev
    monkeypatch.setattr(os, "writev", lambda file, parts: real(file, [b"".join(parts)[: 1 + len(parts) * 300]]))
    monkeypatch.setattr(tar_writer, "SYNC_BYTES", 10_000)
    file = ShardFile(tmp_path / "0.tar")
    record = Record("k", {f"{i:04d}.txt": bytes([i % 251]) * i for i in range(2000)})
    file.add(record)
    index, digest = file.close()
    data = (tmp_path / "0.tar").read_bytes()
    assert hashlib.sha256(data).hexdigest() == digest
    assert {e: data[m.offset : m.offset + m.size] for e, m in index.members(0).items()} == record.members
    assert not scan(tmp_path / "0.tar").damage


def test_a_disk_that_fails_behind_the_writing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: int) -> None:
        raise OSError(5, "input/output error")

    monkeypatch.setattr(os, "fdatasync", fails)
    monkeypatch.setattr(tar_writer, "SYNC_BYTES", 10_000)
    file = ShardFile(tmp_path / "0.tar")
    file.add(Record("k", {"jpg": bytes(2_000_000)}))
    with pytest.raises(OSError, match="input/output error"):
        file.close()
    file.abandon()


@given(st.text(st.sampled_from("abcXYZ019_-é日"), min_size=1, max_size=140), st.integers(0, 8**11 - 1))
def test_every_header_reads_back(key: str, size: int) -> None:
    name = f"{key}.jpg"
    info = tarfile.TarFile(fileobj=io.BytesIO(header(name, size) + bytes(1024)), mode="r", ignore_zeros=True).next()
    assert (info.name, info.size, info.mtime, info.mode, info.uid) == (name, size, 0, 0o644, 0)


def test_webdataset_reads_what_is_built(tmp_path: Path) -> None:
    import webdataset

    numbers(tmp_path / "s")
    found = {
        sample["__key__"]: sample
        for path in sorted((tmp_path / "s").glob("*.tar"))
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
    }
    assert len(found) == 171
    assert found["k00012"]["txt"] == b"number 12"


def test_a_build_holds_every_input_or_lists_it(tmp_path: Path) -> None:
    manifest = numbers(tmp_path / "s", command="build it", licence="CC0")
    found, lines = shards_of(tmp_path / "s"), [json.loads(line) for line in (tmp_path / "s" / "skipped.jsonl").read_text().splitlines()]
    assert len(found) + len(lines) == 200
    assert [line["input"] for line in lines] == [f"input {i}" for i in range(200) if i % 7 == 3]
    assert found == {r.key: r.members for task in TASKS for r in jobs.records(task) if isinstance(r, Record)}
    assert manifest == json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert (manifest["num_samples"], manifest["skipped"], manifest["licence"], manifest["command"]) == (171, 29, "CC0", "build it")
    assert manifest["members"] == {"jpg": 171, "txt": 171}
    assert sum(json.loads((tmp_path / "s" / "sizes.json").read_text()).values()) == 171
    for name, shard in manifest["shards"].items():
        assert shard["sha256"] == hashlib.sha256((tmp_path / "s" / name).read_bytes()).hexdigest()
    assert not list((tmp_path / "s").glob("*tmp*")) + list((tmp_path / "s").glob("unfinished*"))


def test_a_task_that_exceeds_max_bytes_takes_more_shards(tmp_path: Path) -> None:
    numbers(tmp_path / "s", [*TASKS[:2], (), *TASKS[2:3]], max_bytes=20_000)
    names = sorted(p.name for p in (tmp_path / "s").glob("*.tar"))
    assert names[:3] == ["00000-01.tar", "00000-02.tar", "00000.tar"]
    assert not [name for name in names if name.startswith("00002")]  # a task without records keeps its number free
    assert all((tmp_path / "s" / name).stat().st_size <= 20_000 + 10_240 for name in names)
    assert len(shards_of(tmp_path / "s")) == 64


def test_processes_and_places_make_no_difference(tmp_path: Path) -> None:
    numbers(tmp_path / "a", max_bytes=20_000)
    numbers(tmp_path / "b", max_bytes=20_000, processes=2)
    numbers(f"file://{tmp_path}/c", max_bytes=20_000)
    numbers("memory://places/d", max_bytes=20_000, processes=2)
    memory = fsspec.filesystem("memory")
    found = {name.rpartition("/")[2]: hashlib.sha256(memory.cat_file(name)).hexdigest() for name in memory.find("/places/d")}
    assert tree(tmp_path / "a") == tree(tmp_path / "b") == tree(tmp_path / "c") == found
    numbers("memory://places/d", max_bytes=20_000)  # finished: nothing to do
    with pytest.raises(FileExistsError, match="other samples"):
        numbers("memory://places/d", TASKS[1:], max_bytes=20_000)


@pytest.mark.parametrize("finished", [True, False])
def test_a_build_is_not_mixed_with_another(finished: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "s"
    if finished:
        numbers(out)
    else:
        monkeypatch.setattr(writer, "_gather", lambda results, *_: (next(results), 1 / 0))
        with pytest.raises(ZeroDivisionError):
            numbers(out)
        monkeypatch.undo()
    before = tree(out) if finished else None
    for tasks, options in ((TASKS[1:], {}), (TASKS, {"plan": {"of": "others"}}), (TASKS, {"max_bytes": 20_000})):
        with pytest.raises(FileExistsError, match="Choose another --out"):
            numbers(out, tasks, **options)
    if finished:
        assert tree(out) == before
        (out / "00003.tar").write_bytes(b"cut")
        with pytest.raises(FileExistsError, match=r"00003\.tar is gone or has changed"):
            numbers(out)
    else:
        numbers(out)
        numbers(tmp_path / "whole")
        assert tree(out) == tree(tmp_path / "whole")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match=r"not empty .*thesis\.txt"):
        numbers(tmp_path / "other")
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("left", [b"", b"{", b"[]", b"\xff\xfe", b'{"plan": '])
def test_a_damaged_plan_or_manifest_is_named_with_the_remedy(left: bytes, tmp_path: Path) -> None:
    out = tmp_path / "s"
    (out / "unfinished").mkdir(parents=True)
    (out / "unfinished" / "plan.json").write_bytes(left)
    with pytest.raises(FileExistsError, match=rf"^{out}/unfinished/plan\.json is damaged .* Delete {out} and build again") as found:
        numbers(out)
    assert "\n" not in str(found.value)
    shutil.rmtree(out)
    numbers(out)
    (out / "manifest.json").write_bytes(left)
    with pytest.raises(FileExistsError, match=rf"^{out}/manifest\.json is damaged .* Delete {out} and build again"):
        numbers(out)


def test_two_processes_do_not_build_in_one_place(tmp_path: Path) -> None:
    (tmp_path / "s" / "unfinished").mkdir(parents=True)
    with hold(tmp_path / "s" / "unfinished" / "lock"), pytest.raises(FileExistsError, match="another process is building"):
        numbers(tmp_path / "s")
    numbers(tmp_path / "s")


def test_keys_that_come_twice_are_named_with_their_shards(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'k00001' comes twice, in .*00000\.tar and .*00001\.tar"):
        numbers(tmp_path / "a", [(0, 1, 2), (4, 1, 5)])
    with pytest.raises(ValueError, match="'k00001' comes twice"):
        numbers(tmp_path / "b", [(0, 1, 2, 1)])


def test_an_input_that_may_not_be_skipped_is_an_error(tmp_path: Path) -> None:
    for processes in (1, 2):
        with pytest.raises(InputError, match="input 3: sevenths: left out"):
            numbers(tmp_path / f"s{processes}", allow_skipped=False, processes=processes)


KILLED = """
import os
from pathlib import Path
from data_prep.shards.build import build
from tests.data_prep import jobs
tasks = [tuple(range(start, start + 40)) for start in range(0, 800, 40)]
build(Path({out!r}), jobs.slow_records, tasks, plan={{}}, processes=2, max_bytes=30_000)
"""


def test_a_build_killed_five_times_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    """SIGKILL to the whole process group at random moments, from before the first shard to the clearing up at the end."""
    tasks = [tuple(range(start, start + 40)) for start in range(0, 800, 40)]
    build(tmp_path / "whole", jobs.records, tasks, plan={}, processes=1, max_bytes=30_000)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    chance = random.Random(7)
    kills, shards_then = 0, []
    while kills < 5:
        started = subprocess.Popen([sys.executable, "-c", KILLED.format(out=str(tmp_path / "s"))], env=environment, start_new_session=True)
        enough = chance.randrange(1, 16)  # shards more than there were, then a random moment
        goal = len(list((tmp_path / "s").glob("*.tar"))) + enough
        while started.poll() is None and len(list((tmp_path / "s").glob("*.tar"))) < goal:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.02)
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
        kills += 1
        shards_then.append(len(list((tmp_path / "s").glob("*.tar"))))
    assert shards_then == sorted(shards_then)  # nothing was begun again
    assert shards_then[0] < len(list((tmp_path / "whole").glob("*.tar")))
    done = subprocess.run([sys.executable, "-c", KILLED.format(out=str(tmp_path / "s"))], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "s") == tree(tmp_path / "whole")


def _stopped(real: Any, calls: Iterator[int], at: int, *arguments: Any, **options: Any) -> Any:
    if next(calls) == at:
        raise KeyboardInterrupt
    return real(*arguments, **options)


def test_kills_at_the_end_are_resumed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The moments that a random kill seldom meets: between the last shard and the last file that is cleared away."""
    numbers(tmp_path / "whole")
    for at in range(1, 60):
        calls = iter(range(1, 1000))
        with monkeypatch.context() as patched:
            for name in ("write_text", "write_lines", "put", "remove"):
                patched.setattr(files, name, partial(_stopped, getattr(files, name), calls, at))
            try:
                numbers(tmp_path / f"s{at}")
                break
            except KeyboardInterrupt:
                pass
        numbers(tmp_path / f"s{at}")
        assert tree(tmp_path / f"s{at}") == tree(tmp_path / "whole")
    assert at > 20
    with monkeypatch.context() as patched:
        patched.setattr(writer.shutil, "rmtree", partial(_stopped, None, iter([1]), 1))
        with pytest.raises(KeyboardInterrupt):
            numbers(tmp_path / "last")
    numbers(tmp_path / "last")
    assert tree(tmp_path / "last") == tree(tmp_path / "whole")


def test_a_shard_that_no_input_gives_is_not_left_among_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(files, "write_json", partial(_stopped, files.write_json, iter(range(1, 9)), 3))
        with pytest.raises(KeyboardInterrupt):
            numbers(tmp_path / "s")
    (tmp_path / "s" / "00000-07.tar").write_bytes(b"of an input that was longer then")
    with pytest.raises(FileExistsError, match=r"00000-07\.tar is not of this build"):
        numbers(tmp_path / "s")


@pytest.mark.slow
def test_ray_writes_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    numbers(tmp_path / "local", max_bytes=20_000)
    numbers(tmp_path / "ray", max_bytes=20_000, engine="ray", processes=2)
    assert tree(tmp_path / "ray") == tree(tmp_path / "local")


@pytest.mark.slow
def test_an_object_store_gets_the_same_bytes(tmp_path: Path, object_store: Any) -> None:
    numbers("s3://bucket/set/s", max_bytes=20_000, processes=2)
    numbers(tmp_path / "s", max_bytes=20_000)
    object_store.invalidate_cache()
    files = object_store.find("bucket/set/s")
    found = {name.rpartition("/")[2]: hashlib.sha256(object_store.cat_file(name)).hexdigest() for name in files}
    assert found == tree(tmp_path / "s")
