"""pyproject.toml and the imports agree: nothing is installed that nothing imports, nothing imported that is not asked for."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOADERS = {"import_module", "importorskip"}  # functions that take the name of a module
INSIDE = {"torch.utils.tensorboard": "tensorboard"}  # a module of one distribution that is there for another's sake
PEERS = {"open_clip_train"}  # programs of benchmarks and tests that run in environments of their own
COMMANDS = {"ruff", "pyright", "import-linter"}  # run, not imported
UNREACHABLE = re.compile(
    r"error sending request|network was disabled|network connectivity is disabled|dns error|timed? ?out|not found in the cache", re.I
)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements: list[str]) -> set[str]:
    names = {normal(re.match(r"[\w.-]+", text)[0]) for text in requirements}
    return names - {normal(PROJECT["name"])}


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""


@cache
def imported_modules(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it, also by name."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and _name(node.func) in LOADERS and isinstance(first := next(iter(node.args), None), ast.Constant):
            modules.add(str(first.value))
    return modules


owners_of_packages = cache(packages_distributions)


def distributions(*places: str) -> dict[str, set[str]]:
    """Distribution -> the files in `places` that import it."""
    owners, found = owners_of_packages(), {}
    for place in places:
        path = ROOT / place
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            local = {"mmpretrain", "data_prep", "tests", "train"} | PEERS
            if not (file.parent / "__init__.py").exists():  # scripts import their neighbours by name
                local |= {other.stem for other in file.parent.glob("*.py")}
            if place == "tests":
                local |= {other.stem for folder in ("scripts", "examples") for other in (ROOT / folder).rglob("*.py")}
            modules = imported_modules(file)
            tops = {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names) - local
            tops |= {INSIDE[name] for name in modules & INSIDE.keys()}
            for top in tops:
                for owner in set(owners.get(top, [top])):
                    found.setdefault(normal(owner), set()).add(str(file.relative_to(ROOT)))
    return found


BASE = declared(PROJECT["dependencies"])
EXTRAS = {name: declared(requirements) for name, requirements in PROJECT["optional-dependencies"].items()}


def test_every_dependency_is_imported_by_what_installs_it() -> None:
    imported = distributions("mmpretrain", "data_prep").keys()
    assert BASE - imported == set()
    assert EXTRAS["prep"] - imported == set()
    assert EXTRAS["ray"] - imported == set()
    assert EXTRAS["test"] - distributions("tests").keys() == set()
    assert EXTRAS["dev"] == COMMANDS


@pytest.mark.parametrize(
    ("places", "extras"),
    [
        (("mmpretrain", "data_prep"), ("prep", "ray")),
        (("scripts/evaluate.py", "scripts/export.py", "train.py"), ()),
        (("scripts/benchmarks",), ("test",)),
        (("tests",), ("prep", "ray", "test")),
    ],
)
def test_every_import_is_asked_for(places: tuple[str, ...], extras: tuple[str, ...]) -> None:
    asked = BASE.union(*(EXTRAS[extra] for extra in extras))
    assert {name: files for name, files in distributions(*places).items() if name not in asked} == {}


def test_training_needs_no_extra() -> None:
    assert distributions("mmpretrain").keys() <= BASE


def uv(*words: object, seconds: float) -> str:
    """The output of a uv command. Skips the test where there is no uv or no package index to be reached."""
    program = os.environ.get("UV") or shutil.which("uv")
    if program is None:
        pytest.skip("uv is missing (pip install uv)")
    try:
        done = subprocess.run([program, *map(str, words)], capture_output=True, text=True, timeout=seconds, cwd=ROOT)
    except subprocess.TimeoutExpired:
        pytest.skip(f"uv reached no package index in {seconds:.0f} s")
    if done.returncode and ("UV_OFFLINE" in os.environ or UNREACHABLE.search(done.stderr)):
        pytest.skip(f"uv reached no package index: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_installs_beside_the_trainer_of_open_clip(tmp_path: Path) -> None:
    """One environment can hold this package, all its extras, and open_clip with its trainer, which takes webdataset up to 0.2.86."""
    together = tmp_path / "together.in"
    extras = (text for requirements in PROJECT["optional-dependencies"].values() for text in requirements)
    ours = [text for text in (*PROJECT["dependencies"], *extras) if not text.startswith(PROJECT["name"])]
    together.write_text("\n".join([*ours, "open_clip_torch[training]"]))
    resolved = uv("pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python", sys.executable, together, seconds=150)
    versions = dict(line.split("==") for line in resolved.splitlines() if "==" in line)
    assert versions["webdataset"] == "0.2.86"
    assert int(versions["open-clip-torch"].split(".")[0]) >= 3


@pytest.mark.slow
def test_the_wheel_holds_types_and_templates(tmp_path: Path) -> None:
    uv("build", "--quiet", "--wheel", "--out-dir", tmp_path, seconds=150)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    for package in ("mmpretrain", "data_prep"):
        assert f"{package}/py.typed" in names
        kept = {
            path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts
        }
        assert kept <= names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"mmpretrain", "data_prep"}
