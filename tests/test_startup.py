"""What starts fast: help and resolved recipes are shown without the libraries that compute, and say the same as with them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mmpretrain import import_stubs
from mmpretrain.config import recipe

ROOT = Path(__file__).parent.parent
LIGHT = {
    "attr",
    "attrs",
    "antlr4",
    "braceexpand",
    "numpy",
    "omegaconf",
    "yaml",
    "_yaml",
    "rich",
    "markdown_it",
    "mdurl",
    "pygments",
    "PIL",
    "typing_extensions",
}
# Runs a statement, then names what was imported from installed packages: a blank has no file.
PROBE = """
import contextlib, io, json, runpy, sys
before = set(sys.modules)
said = io.StringIO()
with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
    sys.argv = sys.argv[1:]
    exec(sys.argv[0]) if sys.argv[0].startswith("import") else runpy.run_path(sys.argv[0], run_name="__main__")
new = set(sys.modules) - before
loaded = {n.partition(".")[0] for n in new if "site-packages" in (getattr(sys.modules[n], "__file__", None) or "")}
print(json.dumps({"loaded": sorted(loaded), "said": said.getvalue()}))
"""


def _run(*arguments: str) -> dict:
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_help_loads_no_heavy_library_and_documents_every_option():
    found = _run("train.py", "--help")
    assert set(found["loaded"]) <= LIGHT
    assert not set(found["loaded"]) & import_stubs.LIBRARIES
    assert recipe.help_text() in found["said"]  # what it says with the libraries


def test_printed_recipe_is_what_training_would_resolve():
    found = _run("train.py", "configs/demo.yaml", "steps=7", "--print-config")
    assert set(found["loaded"]) <= LIGHT
    assert found["said"] == recipe.dump(recipe.load(ROOT / "configs" / "demo.yaml", ["steps=7"])) + "\n"


def test_importing_the_package_imports_nothing_else():
    assert _run("import mmpretrain")["loaded"] == []


def test_a_wrong_option_is_named_as_ever():
    command = [sys.executable, "train.py", "optim.lrr=1", "--print-config"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "did you mean 'lr'" in done.stderr


def test_a_blank_is_whatever_a_file_asks_for():
    blank = import_stubs.Blank()
    assert blank.anything.at.all(1, key=2)["x"] is not None
    assert int | blank is not None

    class Derived(blank.nn.Module):
        def answer(self) -> int:
            return 42

    assert Derived().answer() == 42
    with pytest.raises(AttributeError):
        blank.__wrapped__  # noqa: B018


def test_a_process_that_computes_gets_no_blanks():
    import torch  # noqa: F401

    before = list(sys.meta_path)
    import_stubs.install()
    assert sys.meta_path == before
