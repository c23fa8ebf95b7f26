"""Files beside the code state what the code says."""

import re
import tomllib
from pathlib import Path

import yaml

import mmpretrain
from data_prep.demo.scenes import GENERATOR_VERSION
from mmpretrain.data.index import VERSION

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_one_version_and_one_licence_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] == mmpretrain.__version__
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert f"## {mmpretrain.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_the_changelog_lists_the_formats_that_are_written() -> None:
    versions = dict(re.findall(r"^\| ([^|]+) \| (\d+) \|", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE))
    assert (
        versions["index of a shard (`NAME.tar.index.npz`)"] == versions["`manifest.json`, `sizes.json` of a set of shards"] == str(VERSION)
    )
    assert versions["scenes of the demo"] == str(GENERATOR_VERSION)


def test_commit_hooks_fetch_nothing() -> None:
    """Each is a command of the project's environment; pre-commit downloads no repository and builds no environment for it."""
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repository["repo"] for repository in hooks["repos"]] == ["local"]
    entries = {hook["id"]: hook["entry"] for repository in hooks["repos"] for hook in repository["hooks"]}
    assert entries.keys() == {"ruff", "ruff-format"}
    assert all(hook["language"] == "system" for repository in hooks["repos"] for hook in repository["hooks"])
    assert all(entry.startswith("uv run --extra dev ruff ") for entry in entries.values())
