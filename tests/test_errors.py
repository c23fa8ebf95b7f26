"""Every entry point: a user's error is one line and the documented status; a bug keeps its traceback."""

import errno
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_prep.__main__ import app
from mmpretrain.errors import FileError, MissingFileError, MMPretrainError, file_errors

ROOT = Path(__file__).parents[1]
BUGS = [ValueError("a bug"), RuntimeError("a bug"), TypeError("a bug"), OSError("a bug"), KeyError("a bug")]


def raising(error: Exception) -> Callable:
    def fail(*args: object, **options: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("error", BUGS, ids=lambda error: type(error).__name__)
def test_only_what_the_operating_system_refuses_becomes_a_file_error(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, file_errors():
        raise error
    assert not isinstance(caught.value, MMPretrainError)
    with pytest.raises(FileError, match=r"\[Errno 28\] No space left on device") as full, file_errors():
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not isinstance(full.value, FileNotFoundError)
    with pytest.raises(MissingFileError) as missing, file_errors():
        (tmp_path / "nothing").read_bytes()
    assert isinstance(missing.value, FileNotFoundError)
    assert str(missing.value) == f"[Errno 2] No such file or directory: '{tmp_path / 'nothing'}'"
    with pytest.raises(FileError, match=" -> "), file_errors():
        (tmp_path / "nothing").rename(tmp_path / "other")


# command line -> what it calls, (an error of the user's: arguments, status, part of the message)
COMMANDS = {
    "index": ("data_prep.index._write_sizes", ["{data}/a.tar"], ["{none}"], 1),
    "validate": ("data_prep.validate.report.summarise", ["{data}/a.tar"], ["{none}"], 2),
    "stats": ("data_prep.stats.numbers.numbers", ["{data}/a.tar", "--out", "{data}/page.html"], ["{none}"], 2),
    "filter": ("data_prep.filter.command.select", ["{data}/a.tar"], ["{none}"], 2),
    "dedup": ("data_prep.dedup.command.deduplicate", ["{data}/a.tar"], ["{none}"], 2),
    "shuffle": ("data_prep.shuffle.write_shards", ["{data}/a.tar", "--out", "{data}/out"], ["{none}", "--out", "{data}/out"], 2),
    "mix": ("data_prep.mix.command.mix_of", ["{data}/r.yaml"], ["{data}/r.yaml", "steps=x"], 2),
    "demo": ("data_prep.demo.command.ensure_demo", ["{data}/demo"], ["{data}/a.tar/demo"], 1),
    "build folder": ("data_prep.build.commands.build", ["{data}", "--out", "{data}x"], ["{none}", "--out", "{data}x"], 2),
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    from data_prep.records import Record
    from data_prep.shards.serial import write_shards
    from tests import runs

    folder = tmp_path / "data"
    write_shards([Record(str(i), {"txt": b"words", "ppm": b"P6 1 1 255 abc"}) for i in range(2)], folder / "made")
    for name in ("00000.tar", "00000.tar.idx.npz"):
        if (folder / "made" / name).exists():
            (folder / "made" / name).rename(folder / name.replace("00000", "a"))
    runs.write_recipe(folder / "r.yaml", runs.recipe(folder, folder / "run"))
    return folder


def call(command: str, arguments: list[str], data: Path):
    places = {"data": data, "none": data / "nothing.tar"}
    return CliRunner().invoke(app, [*command.split(), *(text.format(**places) for text in arguments)])


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("error", BUGS, ids=lambda error: type(error).__name__)
def test_a_bug_in_a_data_command_keeps_its_traceback(command: str, error: Exception, data: Path, monkeypatch) -> None:
    target, arguments, _, _ = COMMANDS[command]
    monkeypatch.setattr(target, raising(error))
    result = call(command, arguments, data)
    assert result.exception is error, result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_an_error_of_the_user_in_a_data_command_is_one_message_with_the_documented_status(command: str, data: Path) -> None:
    _, _, arguments, status = COMMANDS[command]
    result = call(command, arguments, data)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    assert "rror" in result.output  # click's box for status 2, one line otherwise
    if status == 1 or command == "validate":
        assert len([line for line in result.output.splitlines() if line.startswith("error: ")]) == 1


SCRIPTS = {
    "train": ("mmpretrain.trainer.train", ["{data}/r.yaml"], [["{data}/none.yaml"], ["{data}/latin.yaml"]], 2),
    "evaluate": ("evaluate.evaluate", ["run", "knn", "data=x"], [["{none}", "knn", "data=x"], ["{data}", "knn", "data=x"]], 2),
    "export": ("export.load_model", ["{data}/run", "--out", "{data}/out"], [["{none}", "--out", "{data}/out"]], 1),
}


def run_script(name: str, arguments: list[str], data: Path, monkeypatch) -> int:
    places = {"data": data, "none": data / "nothing"}
    monkeypatch.syspath_prepend(str(ROOT if name == "train" else ROOT / "scripts"))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *(text.format(**places) for text in arguments)])
    script = importlib.import_module(name)
    if name != "export":
        return script.main()
    import typer

    tool = typer.Typer()
    tool.command()(script.main)
    return tool(sys.argv[1:], standalone_mode=False) or 0


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("error", BUGS, ids=lambda error: type(error).__name__)
def test_a_bug_in_a_script_keeps_its_traceback(name: str, error: Exception, data: Path, monkeypatch) -> None:
    target, arguments, _, _ = SCRIPTS[name]
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setattr(target, raising(error))
    if name == "export":
        monkeypatch.setattr("export.newest_checkpoint", lambda source: source)
    with pytest.raises(type(error)) as caught:
        run_script(name, arguments, data, monkeypatch)
    assert caught.value is error


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_error_of_the_user_in_a_script_is_one_line_with_the_documented_status(name: str, data: Path, monkeypatch, capsys) -> None:
    (data / "latin.yaml").write_bytes("run_dir: \xe9".encode("latin-1"))
    _, _, several, status = SCRIPTS[name]
    for arguments in several:
        assert run_script(name, arguments, data, monkeypatch) == status
        shown = capsys.readouterr().err.strip()
        assert shown.startswith("error: ")
        assert len(shown.splitlines()) == 1


def test_a_text_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    from mmpretrain.data.shards import load_classes
    from mmpretrain.evaluators.data.datasets import DataConfig, open_dataset

    (tmp_path / "names.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "table.csv").write_bytes("file,label\na.png,caf\xe9".encode("latin-1"))
    (tmp_path / "names.json").write_text("{")
    for read, name in (
        (lambda: load_classes(str(tmp_path / "names.txt")), "names.txt is not UTF-8"),
        (lambda: load_classes(str(tmp_path / "names.json")), "names.json is not JSON"),
    ):
        with pytest.raises(MMPretrainError, match=name) as caught:
            read()
        assert caught.value.status == 2
    (tmp_path / "a.png").touch()
    with pytest.raises(MMPretrainError, match=r"table\.csv: 1 of 1 items cannot be used \(1 not_utf8"):  # an odd byte costs its row
        open_dataset(DataConfig(str(tmp_path / "table.csv")), "classification")
