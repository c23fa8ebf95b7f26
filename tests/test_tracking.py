"""Run files survive crashes and resumes; the console line cannot be driven by strangers' strings."""

import io
import json
import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from mmpretrain.tracking.console import Progress, console_table, duration, plain
from mmpretrain.tracking.grids import view_grid
from mmpretrain.tracking.jsonl import JsonLines, file_name, jsonable, latest_results, read_jsonl
from mmpretrain.tracking.tracker import Tracker


def steps(path: Path) -> list:
    return [r["step"] for r in read_jsonl(path)]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_append_writes_one_object_per_line(tmp_path: Path):
    file = JsonLines(tmp_path / "a.jsonl")
    file.append({"step": 1, "caption": "two\nlines é"})
    file.append({"step": 2, "loss": torch.tensor(0.5), "bad": float("nan")})
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "caption": "two\nlines é"}, {"step": 2, "loss": 0.5, "bad": None}]


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_torn_anywhere_is_dropped_and_the_next_one_is_whole(tmp_path: Path, cut: int):
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1}\n' + '{"step": 2}\n'[:cut])
    before = [1, 2] if cut == 11 else [1]  # at 11 only the newline is missing
    assert steps(path) == before
    JsonLines(path).append({"step": 3})
    assert steps(path) == [*before, 3]


def test_truncate_after_keeps_null_steps_and_drops_the_rest(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1}\n{"step": null}\n{"step": 2}\n{"step": 3}\n{"step": 2, "late": 1}\n{"st')
    JsonLines(path).truncate_after(2)
    assert steps(path) == [1, None, 2, 2]
    assert path.read_bytes().endswith(b"\n")
    assert list(tmp_path.iterdir()) == [path]


def test_a_bad_line_in_the_middle_is_named(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1}\nnot json\n[2]\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: expected a JSON object, found b'not json'"):
        read_jsonl(path)
    with pytest.warns(UserWarning, match="line 2"), pytest.warns(UserWarning, match="line 3"):
        assert [r["step"] for r in read_jsonl(path, strict=False)] == [1, 3]
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.jsonl"
    file = JsonLines(path)
    file.append({"step": 1})
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:5]))
    with pytest.raises(OSError, match="disk full"):
        file.append({"step": 2})
    assert path.read_text() == '{"step": 1}\n'


@given(st.text())
def test_plain_leaves_no_control_character(text: str):
    cleaned = plain(text)
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 or 0x202A <= ord(c) <= 0x202E for c in cleaned)
    cleaned.encode()


def test_plain_keeps_words():
    assert plain("a\x1b[31mred\x07 fox\nruns ünïcode 狐") == "a[31mred fox runs ünïcode 狐"


@pytest.mark.parametrize("name", ["../../etc/passwd", "/abs", "clip/views", "..", "", "a\x00b"])
def test_file_names_stay_inside_the_folder(name: str):
    assert Path("f", file_name(name, 40)).parent == Path("f")
    assert file_name(name, 40).endswith("-00000040")


def test_jsonable_is_strict_json():
    value = jsonable({1: {"t": torch.ones(2, 2), "inf": [math.inf, -math.inf, 1]}, "path": Path("x"), "b": b"\x89P"})
    assert json.loads(json.dumps(value, allow_nan=False)) == {
        "1": {"t": [[1, 1], [1, 1]], "inf": [None, None, 1]},
        "path": "x",
        "b": "iVA=",
    }


def test_metrics_line_is_the_documented_one(tmp_path: Path):
    tracker = Tracker(tmp_path, log_every=2, total_steps=5, console=quiet())
    for step in range(1, 6):
        scalars = {"loss": torch.tensor(3.0), "clip/loss": 2.0, "simclr/loss": 1.0}
        tracker.log(step, step * 256, scalars, data_wait_s=0.1 * (step % 2), step_s=0.5, lr=1e-3)
    tracker.close()
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 4, 5]
    assert list(lines[2]) == ["step", "samples_seen", "loss", "clip/loss", "simclr/loss", "samples_per_s", "data_wait_s", "step_s", "lr"]
    assert lines[2]["samples_seen"] == 1024
    assert lines[2]["samples_per_s"] == 512.0  # 256 rows in 0.5 s
    assert lines[2]["data_wait_s"] == pytest.approx(0.05)  # mean of steps 3 and 4
    assert lines[2]["lr"] == 1e-3


def test_logging_only_at_due_steps_gives_the_same_rate(tmp_path: Path):
    tracker = Tracker(tmp_path, log_every=10, total_steps=20, console=quiet())
    for step in (10, 20):
        tracker.log(step, step * 64, {"loss": 1.0}, 0.0, 0.25, 0.1)
    tracker.close()
    assert [line["samples_per_s"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [256.0, 256.0]


def run(folder: Path, first: int, last: int, resume: int | None) -> None:
    tracker = Tracker(folder, log_every=1, total_steps=6, resume_step=resume, console=quiet())
    for step in range(first, last + 1):
        tracker.log(step, step * 8, {"loss": 1 / step}, 0.0, 1.0, 0.1)
        tracker.skipped(step, [{"source": "s", "shard": "a.tar", "key": f"k{step}", "reason": "empty_caption"}])
        tracker.images(step, "views", torch.zeros(3, 4, 4))
        if step % 2 == 0:
            tracker.result(step, {"evaluator": "knn", "name": "toy", "n": 4, "metrics": {"acc1": step / 10}})
    tracker.close()


def test_a_resumed_run_leaves_the_files_of_an_undisturbed_one(tmp_path: Path):
    run(tmp_path / "whole", 1, 6, None)
    run(tmp_path / "cut", 1, 5, None)
    with (tmp_path / "cut/metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    run(tmp_path / "cut", 4, 6, 3)
    for name in ("metrics", "results", "skipped"):
        assert (tmp_path / f"cut/{name}.jsonl").read_bytes() == (tmp_path / f"whole/{name}.jsonl").read_bytes()
    assert {p.name for p in tmp_path.glob("cut/images/*")} == {p.name for p in tmp_path.glob("whole/images/*")}


def test_starting_anew_keeps_only_lines_without_a_step(tmp_path: Path):
    run(tmp_path, 1, 4, None)
    JsonLines(tmp_path / "results.jsonl").append({"step": None, "name": "by hand"})
    Tracker(tmp_path, 1, 6, console=quiet()).close()
    assert steps(tmp_path / "results.jsonl") == [None]
    assert steps(tmp_path / "metrics.jsonl") == []
    assert not list(tmp_path.glob("images/*.png"))


def test_tensorboard_has_the_scalars_once_after_a_resume(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, 1, 5, None)
    run(tmp_path, 4, 6, 3)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [e.step for e in events.Scalars("toy/acc1")] == [2, 4, 6]
    assert events.Images("views")


def test_other_ranks_write_nothing(tmp_path: Path):
    tracker = Tracker(tmp_path / "run", 1, 2, is_main=False)
    tracker.log(1, 8, {"loss": 1.0}, 0, 1, 0.1)
    tracker.result(1, {"metrics": {}})
    tracker.skipped(1, [{}])
    tracker.images(1, "a", torch.zeros(3, 2, 2))
    tracker.message("hello")
    tracker.table([{"a": 1}])
    tracker.close()
    assert not (tmp_path / "run").exists()


def test_a_nan_loss_is_null_in_the_file_and_nan_on_the_console(tmp_path: Path):
    console = quiet()
    tracker = Tracker(tmp_path, 1, 1, console=console)
    tracker.log(1, 8, {"loss": float("nan")}, 0.25, 1.0, 0.1)
    tracker.close()
    assert read_jsonl(tmp_path / "metrics.jsonl")[0]["loss"] is None
    assert "step 1/1  loss nan  8 samples/s  data wait 25%  ETA 0:00:00" in console.file.getvalue()


def test_plain_progress_is_periodic_and_always_shows_the_last_step():
    now = [0.0]
    console = Console(file=io.StringIO(), width=200, get_time=lambda: now[0])
    progress = Progress(10, console, every_s=3)
    for step in range(1, 11):
        progress.update(step, {"loss": 2.0, "bad\x1b[2J[red]name": 1.0}, 100, 0.5, 1.0)
        now[0] += 1
    lines = console.file.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/10", "4/10", "7/10", "10/10"]
    assert "[red]name" in lines[0]
    assert "\x1b" not in lines[0]
    assert lines[0].endswith("ETA 0:00:09")


def test_on_a_terminal_the_line_is_live_and_messages_stay():
    console = Console(file=io.StringIO(), force_terminal=True, width=60)
    progress = Progress(2, console)
    progress.update(1, {"loss": 1.0}, 10, 0.0, 1.0)
    progress.print("checkpoint \x1b[2Jsaved")
    progress.update(2, {"loss": 0.5}, 10, 0.0, 1.0)
    progress.close()
    shown = console.file.getvalue()
    assert "checkpoint [2Jsaved" in shown
    assert "step 2/2" in shown
    assert shown.count("\n") < 6


def test_console_table_has_one_line_per_metric():
    console = quiet()
    rows = [{"name": "a[b]", "model": "f" * 64, "metrics": {"acc1": 0.41, "acc5": 0.7}}, {"name": "c", "metrics": {"acc1": 1.0}}]
    console.print(console_table(rows))
    lines = [line.replace("│", " ").split() for line in console.file.getvalue().splitlines() if line.startswith("│")]
    assert lines == [["a[b]", "acc1", "0.4100"], ["a[b]", "acc5", "0.7000"], ["c", "acc1", "1.0000"]]


def test_console_table_of_other_rows_has_their_columns():
    console = quiet()
    console.print(console_table([{"method": "clip", "hours": 1.5}, {"method": "[b]", "seeds": 3}], "Cost"))
    shown = console.file.getvalue()
    assert all(word in shown for word in ("Cost", "method", "hours", "seeds", "1.5000", "[b]"))


def test_latest_results_and_duration():
    lines = [{"name": "a", "step": 1}, {"name": "b", "step": 1}, {"name": "a", "step": 2}]
    assert latest_results(lines) == [{"name": "a", "step": 2}, {"name": "b", "step": 1}]
    assert duration(3723.9) == "1:02:03"


def test_images_are_png_with_the_grids_values(tmp_path: Path):
    tracker = Tracker(tmp_path, 1, 1, console=quiet())
    grid = torch.zeros(3, 2, 3)
    grid[0, 1, 2] = 2.0  # clamped
    tracker.images(7, "pairs/views", grid)
    tracker.close()
    image = Image.open(tmp_path / "images/pairs_views-00000007.png")
    assert (image.size, image.getpixel((2, 1)), image.getpixel((0, 0))) == ((3, 2), (255, 0, 0), (0, 0, 0))


def test_view_grid_undoes_the_normalisation_and_places_each_view():
    mean, std = (0.5, 0.25, 0.0), (0.5, 0.5, 0.5)
    big, small = torch.zeros(2, 3, 4, 4), torch.ones(3, 3, 2, 2)
    grid = view_grid([big, small], mean, std, pad=1)
    assert grid.shape == (3, 1 + 2 * 5, 1 + 3 * 5)
    assert grid[:, 1, 1].tolist() == [0.5, 0.25, 0.0]  # zeros are the mean
    assert grid[:, 6, 11].tolist() == [1.0, 0.75, 0.5]  # row 2, view 3
    assert grid[:, 1, 11].tolist() == [1.0, 1.0, 1.0]  # no third view in row 1: white
    with pytest.raises(ValueError, match="n, 3, h, w"):
        view_grid([torch.zeros(3, 4, 4)], mean, std)
