"""Every command, Python block and recipe of the README, CONTRIBUTING.md and docs/ is run: as written, but on less data and for fewer steps.

The commands of docs/data.md run in the default suite (tests/data_prep/test_docs_commands.py), the other pages' in the slow one.
"""

from __future__ import annotations

import glob
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from mmpretrain.config import recipe as recipes
from mmpretrain.data.sample_stream import SampleStream
from mmpretrain.objectives import OBJECTIVES
from mmpretrain.tracking.jsonl import read_jsonl
from mmpretrain.trainer import train
from tests import docs, runs
from tests.data_prep import test_docs_commands as data_page
from tests.data_prep.build.readers.support import image
from tests.docs import ROOT
from tests.tiny import MODEL

NOT_RUN = {
    "README.md": {"uv run --extra test pytest", "pip install uv"},
    "CONTRIBUTING.md": {"make check", "make test", "uv run --extra test pytest -m slow", ".ci/run", "uvx pre-commit install"},
    "docs/data.md": {
        "python -m data_prep build KIND INPUT --out SHARDS",
        "python -m data_prep build datasets user/name --split train --stream --caption text --out shards/name",
    },
    "docs/recipes.md": {"train.py RECIPE --plugin my_package.my_module"},
}
# Benchmarks want a quiet machine and hours: tests/test_benchmarks.py runs them small.
BENCHMARK = re.compile(r"(make bench|(python )?scripts/benchmarks/(?!scaling_model)\S+)( |$)")
TINY = "model=tiny.json steps=2 optim.warmup_steps=1"
SHORTER = (  # (in a page, in its test)
    (r"\bRECIPE\b", "configs/demo.yaml"),
    (r"\bRUN\b", "runs/demo"),
    (r"\bdemo OUT$", "demo data/demo"),  # all of it: what the README's command trains on
    (r"\bOUT\b", "out --pairs 300 --photos 300"),
    (r"--test 5000", "--test 50"),
    (r"--check", "--test 50 --check"),
    (r"--nproc_per_node 8 (.*)", r"--nproc_per_node 2 \1 run_dir=runs/two steps=2 evaluators=null"),
    (r"launch train\.py$", "launch train.py steps=4 optim.warmup_steps=1"),
    (r"(configs/slip_\w+\.yaml.*)", rf"\1 {TINY} epochs=null sources.pairs.batch_size=4 sources.photos.batch_size=4"),
    (r"(configs/emoji_\w+\.yaml)", rf"\1 {TINY}"),
    (r"train=data/demo/pairs", "train=data/demo/val"),
    (r"epochs=25", "epochs=1"),
    (r"'(\w+)/\*\.tar'", r"'\1/pairs/*.tar'"),
)


TOPS = ("mmpretrain", "data_prep", "scripts", "examples", "configs", "tests", "train.py")
MADE_UP = {"config.yaml", "utils.py"}  # a file of a run; what this project does not have


def test_what_is_not_run_is_listed_and_marked() -> None:
    """Each page names the commands that no test runs; this file names the same; all are commands of their page."""
    assert {page: set(docs.not_run(page)) for page in docs.PAGES if docs.not_run(page)} == NOT_RUN
    for page, marked in NOT_RUN.items():
        assert marked <= set(docs.commands(page))
        assert all(docs.not_run(page).values())


def test_commands_are_seen_wherever_they_stand() -> None:
    """In fenced blocks, over continued lines, and in the text: without this a page could go untested."""
    assert "uv run accelerate launch train.py" in docs.commands("README.md")
    assert "torchrun --nproc_per_node 8 train.py RECIPE" in docs.commands("README.md")
    assert any(c.endswith("templates='[\"{c}\"]'") and "exclude='skin tone'" in c for c in docs.commands("docs/emoji.md"))
    assert any(c.startswith("scripts/evaluate.py RUN finetune") and c.endswith("--precision bf16") for c in docs.commands("docs/demo.md"))
    languages = {name for page in docs.PAGES for name in docs.languages(page)}
    assert languages == {"", "python", "yaml"}


@pytest.mark.parametrize("page", docs.PAGES)
def test_files_and_modules_that_a_page_names_are_there(page: str) -> None:
    """Paths as the repository has them or as they end, and dotted names that begin with a package."""
    spans = re.findall(r"`([\w./]+)`", docs.text(page))
    files = [path.relative_to(ROOT).as_posix() for top in TOPS for path in [ROOT / top, *(ROOT / top).rglob("*")]]
    missing = [s for s in spans if re.search(r"\w\.(py|yaml)$", s) and not any(f"/{file}".endswith(f"/{s}") for file in files)]
    missing += [s for s in spans if re.match(r"(mmpretrain|data_prep)\.\w", s) and not exists(s)]
    missing += [s for s in spans if re.match(r"(mmpretrain|data_prep|tests|scripts|examples|configs)/", s) and not (ROOT / s).exists()]
    missing += [link for link in re.findall(r"\]\((?!\w+:)([\w./-]+)", docs.text(page)) if not (ROOT / page).parent.joinpath(link).exists()]
    assert [name for name in missing if name not in MADE_UP] == []


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        module, _, member = name.rpartition(".")
        return hasattr(importlib.import_module(module), member)


def runnable(page: str) -> list[str]:
    left_out = docs.not_run(page)
    return [c for c in docs.commands(page) if c not in left_out and not BENCHMARK.match(c)]


@pytest.mark.parametrize("page", [page for page in docs.PAGES if docs.blocks(page, "yaml")])
def test_recipes_are_valid(page: str, tmp_path: Path) -> None:
    for block in docs.blocks(page, "yaml"):
        rest = "" if "objectives:" in block else "objectives: {clip: {source: pairs}}\nsteps: 1\n"
        (tmp_path / "recipe.yaml").write_text(block + rest)
        config = recipes.load(tmp_path / "recipe.yaml", ["run_dir=runs/x"])
        assert "pairs" in config.sources


def test_python_of_the_data_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    data_page.shards("shards/usda")
    for block in docs.blocks("docs/data.md", "python"):
        exec(compile(block, "docs/data.md", "exec"), {"__name__": "__main__"})
    keys = [sample["__key__"] for sample in SampleStream("shards/usda/*.tar")]
    assert sorted(keys) == ["usda0", "usda1"]
    assert capsys.readouterr().out.splitlines() == ["torch.Size([2, 120, 100, 3]) 2", str(keys[1:])]


def test_the_objective_of_the_extending_page_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = docs.blocks("docs/extending.md", "python")
    name = Path(re.match(r"# (\S+\.py)\n", block)[1]).stem
    file = tmp_path / f"{name}.py"
    file.write_text(block)
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(OBJECTIVES.known, name, module.SimSiam)
    data = runs.shards(tmp_path)
    objectives = {"clip": {"source": "pairs"}, name: {"source": "photos"}}
    path = runs.write_recipe(tmp_path / "r.yaml", runs.recipe(data, tmp_path / "run", objectives=objectives, steps=6, accumulate=2))
    assert train(recipes.load(path)) == 0
    losses = [line[f"{name}/loss"] for line in runs.logged(tmp_path / "run")]
    assert len(losses) == 6
    assert all(-1 <= loss <= 1 for loss in losses)
    assert losses[-1] < losses[0]


# ---- commands, page by page, in one folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A clone as the pages assume it, with small inputs of the names that they use."""
    root, before = tmp_path_factory.mktemp("docs"), Path.cwd()
    for name in ("train.py", "scripts", "configs", "examples", "docs"):
        (root / name).symlink_to(ROOT / name)
    os.chdir(root)
    try:
        data_page.make_inputs()
        Path("tiny.json").write_text(json.dumps(MODEL))
        for vendor in ("noto", "twemoji"):
            rows = [f"{name}.png,{code:x},{name},a|b" for code, name in enumerate(("star", "moon", "sun"), 0x1F600)]
            data_page.put(f"raw/emoji-{vendor}/emoji.csv", "\n".join(["file,codepoints,name,keywords", *rows]))
            for number, name in enumerate(("star", "moon", "sun")):
                data_page.put(f"raw/emoji-{vendor}/{name}.png", image((80 * number, 40, 99)))
        for split, kind, number in ((s, k, n) for s in ("train", "test") for k in ("hat", "shoes") for n in range(12)):
            path = Path(f"raw/clothing/{split}/{kind}/{number}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (80, 80), (200 * (kind == "hat"), 10 * number, 90)).save(path)
        yield root
    finally:
        os.chdir(before)


def run(command: str, folder: Path, seconds: float = 900) -> str:
    for written, shorter in SHORTER:
        command = re.sub(written, shorter, command)
    words = shlex.split(command)
    if words[:2] == ["uv", "run"]:
        words = words[2:]
    if words[:2] == ["accelerate", "launch"]:
        words = ["-m", "accelerate.commands.launch", *words[2:]]
    elif words[0] == "torchrun":
        words = ["-m", "torch.distributed.run", "--standalone", *words[1:]]
    elif words[0] == "python":
        words = words[1:]
    words = [name for word in words for name in (sorted(glob.glob(word, root_dir=folder)) if re.match(r"[\w/-]+\*", word) else [word])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def demo_run(folder: Path) -> Path:
    """The run that the README's first command leaves, on its own data."""
    run("uv run accelerate launch train.py", folder)
    lines = read_jsonl(folder / "runs" / "demo" / "metrics.jsonl")
    assert lines[-1]["step"] == 4
    assert (folder / "runs" / "demo" / "report.html").stat().st_size > 10_000
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in docs.PAGES if page != data_page.PAGE and runnable(page)])
def test_every_command_of_the_page_works(page: str, demo_run: Path) -> None:
    for command in runnable(page):
        if command != "uv run accelerate launch train.py":
            run(command, demo_run)


@pytest.mark.slow
@pytest.mark.parametrize("command", data_page.ON_THE_DEMO)
def test_commands_of_the_data_page_that_need_the_demo(command: str, demo_run: Path) -> None:
    assert command in docs.commands(data_page.PAGE)
    run(command, demo_run)
