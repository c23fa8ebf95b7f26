"""Samples for training loops of other people: what webdataset yields from the same shards, in the order of our loader."""

import itertools
import multiprocessing
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import webdataset
from torch.utils.data import DataLoader

from data_prep.records import Record
from data_prep.shards.serial import write_shards
from mmpretrain.data.sample_stream import SampleStream
from mmpretrain.data.schema import BadSample
from mmpretrain.data.source import Source, SourceConfig, SplitConfig
from mmpretrain.data.views import CenterView
from tests.data.generated import encoded, picture

COUNT = 43


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stream")
    members = ({"jpg": encoded(picture(i)), "txt": f"picture {i}".encode(), "cls": str(i % 3).encode()} for i in range(COUNT))
    write_shards((Record(f"k{i:02d}", each) for i, each in enumerate(members)), root, max_count=8)
    return root


def keys(samples) -> list[str]:
    return [sample["__key__"] for sample in samples]


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, ranks: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(ranks))


def test_samples_are_those_of_webdataset(folder: Path) -> None:
    """Every key, url and member of webdataset's own reading, each once; only the order and the slot are ours."""
    ours = {sample["__key__"]: sample for sample in SampleStream(f"{folder}/*.tar")}
    theirs = list(webdataset.WebDataset(f"{folder}/{{00000..00005}}.tar", shardshuffle=False))
    assert len(ours) == len(theirs) == COUNT
    for sample in theirs:
        mine = ours[sample["__key__"]]
        assert {name: mine[name] for name in mine if name != "__slot__"} == {k: v for k, v in sample.items() if k != "__local_path__"}
    assert keys(ours.values()) != keys(theirs)


@pytest.mark.parametrize("split", [None, {"holdout": 0.3, "part": "holdout"}])
def test_order_is_that_of_the_loader(folder: Path, split: dict | None) -> None:
    config = SourceConfig(shards=[{"path": f"{folder}/0000[0-2].tar", "weight": 2}, {"path": f"{folder}/0000[3-5].tar"}], shuffle_window=2)
    config.split = SplitConfig(**split) if split else None
    source = Source("pairs", config, (CenterView(size=16),), seed=5)
    count = 2 * source.num_samples + 3
    rows = [key.rpartition("/")[2] for key in source.rows(range(count)).keys]
    assert keys(itertools.islice(SampleStream(config, "pairs", 5, epochs=None), count)) == rows
    assert keys(SampleStream(config, "pairs", 5, epochs=2)) == rows[: 2 * source.num_samples]
    assert keys(SampleStream(config, "pairs", 6, epochs=2)) != rows[: 2 * source.num_samples]
    assert keys(SampleStream(config, "pairs", 5, start=7, epochs=2)) == rows[7 : 2 * source.num_samples]


@pytest.mark.parametrize(("ranks", "workers", "block"), [(1, 3, 1), (3, 1, 4), (2, 2, 5), (4, 3, 1), (2, 3, 64)])
def test_ranks_and_workers_share_an_epoch_without_loss_or_repetition(
    folder: Path, ranks: int, workers: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, parts = SampleStream(str(folder), block=block), []
    monkeypatch.setenv("NUM_WORKERS", str(workers))
    for rank, worker in itertools.product(range(ranks), range(workers)):
        as_rank(monkeypatch, rank, ranks)
        monkeypatch.setenv("WORKER", str(worker))
        parts.append(list(stream))
    slots = [sample["__slot__"] for part in parts for sample in part]
    assert sorted(slots) == list(range(COUNT))
    assert len({sample["__key__"] for part in parts for sample in part}) == COUNT
    assert all([s["__slot__"] for s in part] == sorted(s["__slot__"] for s in part) for part in parts)


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_global_batches_do_not_depend_on_ranks_or_workers(folder: Path, ranks: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 8 over all ranks: of 8, 4 or 2 rows. They begin again from any number of samples."""
    whole, rows = [(s["__slot__"], s["__key__"]) for s in SampleStream(str(folder), seed=1)], 8 // ranks
    for start in (0, 16):
        parts = []
        for rank in range(ranks):
            as_rank(monkeypatch, rank, ranks)
            stream = SampleStream(str(folder), seed=1, start=start, block=rows)
            loader = DataLoader(stream, batch_size=rows, num_workers=workers, collate_fn=list, multiprocessing_context=_fork(workers))
            parts.append([[(s["__slot__"], s["__key__"]) for s in batch] for batch in loader])
        full = min(map(len, parts))
        batches = [[row for part in parts for row in part[step]] for step in range(full)]
        assert batches[:3] == [whole[start + 8 * step : start + 8 * step + 8] for step in range(3)]


def _fork(workers: int):
    return multiprocessing.get_context("fork") if workers else None


@pytest.mark.slow
def test_a_spawned_worker_opens_the_shards_itself(folder: Path) -> None:
    stream = SampleStream(str(folder), seed=1)
    loader = DataLoader(stream, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert keys(loader) == keys(stream)


def test_stages_of_webdataset_follow(folder: Path) -> None:
    stream = SampleStream(str(folder), seed=2)
    pipeline = webdataset.DataPipeline(
        stream, webdataset.decode("rgb8"), webdataset.to_tuple("jpg;png", "txt", "cls"), webdataset.batched(10)
    )
    images, captions, labels = next(iter(pipeline))
    assert images.shape == (10, 24, 32, 3)
    assert captions == [f"picture {int(key[1:])}" for key in keys(itertools.islice(stream, 10))]
    assert [int(label) for label in labels] == [int(caption.split()[1]) % 3 for caption in captions]
    assert sum(len(batch[1]) for batch in pipeline) == COUNT


def test_a_corrupt_sample_is_the_handlers(tmp_path: Path) -> None:
    write_shards([Record(f"k{i}", {"txt": b"caption %d" % i}) for i in range(4)], tmp_path)
    shard = tmp_path / "00000.tar"
    shard.write_bytes(shard.read_bytes().replace(b"caption 2", b"caption X"))
    with pytest.raises(BadSample, match=r"checksum: .*00000\.tar, k2: the 9 bytes"):
        list(SampleStream(str(tmp_path)))
    errors = []
    found = keys(SampleStream(str(tmp_path), handler=lambda error: errors.append(error) or True))
    assert sorted(found) == ["k0", "k1", "k3"]
    assert [error.reason for error in errors] == ["checksum"]
    stopped = keys(SampleStream(str(tmp_path), handler=webdataset.handlers.ignore_and_stop))
    whole = keys(SampleStream(str(tmp_path), handler=webdataset.handlers.ignore_and_continue))
    assert stopped == whole[: len(stopped)]
    assert len(stopped) < 4


@pytest.mark.parametrize("options", [{"start": -1}, {"block": 0}, {"epochs": 0}])
def test_options_out_of_range_are_refused(folder: Path, options: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} {next(iter(options.values()))}"):
        SampleStream(str(folder), **options)


OLDEST = """
import sys, webdataset
sys.path.insert(0, sys.argv[2])
from mmpretrain.data.sample_stream import SampleStream
from mmpretrain.data.shard_names import expand_braces
assert webdataset.__version__ == "0.2.86", webdataset.__version__
assert webdataset.shardlists.expand_urls("a{0..10}{b,c}") == expand_braces("a{0..10}{b,c}")
stages = webdataset.decode("rgb8"), webdataset.to_tuple("jpg;png", "txt"), webdataset.batched(10)
pipeline = webdataset.DataPipeline(SampleStream(sys.argv[1], seed=2), *stages)
print(*(caption for _, captions in pipeline for caption in captions), sep=chr(10))
"""


@pytest.mark.slow
def test_the_oldest_webdataset_that_is_allowed_reads_the_same(folder: Path, tmp_path: Path) -> None:
    """0.2.86, the newest that open_clip's trainer takes, in an environment of its own in front of this one's packages."""
    from tests.test_interop import make_environment

    programs = make_environment(tmp_path, "webdataset==0.2.86")
    own = subprocess.run(
        [programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True
    )
    (Path(own.stdout.strip()) / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    root = Path(sys.modules["mmpretrain"].__path__[0]).parent
    done = subprocess.run([programs / "python", "-c", OLDEST, folder, root], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stream = SampleStream(str(folder), seed=2)
    assert done.stdout.splitlines() == [sample["txt"].decode() for sample in stream]
