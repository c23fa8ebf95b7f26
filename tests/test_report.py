"""The report: one page that needs nothing else, from whole, torn, empty and hostile run folders."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from mmpretrain.report.extras import load_extras, save_result_extras
from mmpretrain.report.page import write_report
from mmpretrain.report.plots import curves, heat_map, smooth, suits_log, thin
from mmpretrain.report.tables import baselines_of, confusion, costs, headline, predictions, thumbnail
from mmpretrain.types import Result

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


class Page(HTMLParser):
    """Tags, addresses, ids and text of a page; fails on a tag that is closed wrongly."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "action", "data")]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]
        self.ids += [v or "" for k, v in attrs if k == "id"]
        if tag not in ("meta", "img", "br", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag in self.open[-1:]:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def read(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert page.handlers == []
    assert all(a.startswith(("data:image/", "#")) for a in page.addresses)  # nothing is fetched
    assert len(page.ids) == len(set(page.ids))
    assert {a[1:] for a in page.addresses if a.startswith("#")} <= set(page.ids)
    return page


def lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def png(colour: str = "red") -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def metric_lines(steps: int, every: int = 1) -> list[dict[str, Any]]:
    return [
        {
            "step": s,
            "samples_seen": s * 64,
            "loss": 9 / s**0.5 + 1,
            "clip/loss": 9 / s**0.5,
            "clip/logit_scale": 14.0,
            "samples_per_s": 512.0,
            "data_wait_s": 0.001,
            "step_s": 0.125,
            "lr": 1e-3,
        }
        for s in range(every, steps + 1, every)
    ]


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A run with everything in it, every string of strangers hostile."""
    lines(tmp_path / "metrics.jsonl", metric_lines(40))
    result = {"evaluator": "zero_shot", "name": "shapes", "dataset": EVIL, "n": 1000, "seed": 0}
    at_20, at_40 = ({"acc1": a, "acc5": 0.95, "random_acc1": 0.125} for a in (0.25, 0.4375))
    lines(tmp_path / "results.jsonl", [{"step": 20, **result, "metrics": at_20}, {"step": 40, **result, "metrics": at_40}])
    skip = {"source": "pairs", "shard": "0.tar", "key": EVIL, "reason": "empty_caption"}
    lines(tmp_path / "skipped.jsonl", [{"step": 1, **skip}] * 60)
    (tmp_path / "config.yaml").write_text("run_dir: x # <b>\nversions: {torch: '2.15', open_clip: '3.3'}\n")
    (tmp_path / "images").mkdir()
    for name in ("pairs_views-00000001", "pairs_views-00000040", "simmim_reconstruction-00000040"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"images/{name}.png")
    examples = [
        {"key": EVIL, "truth": "cat", "predicted": p, "score": 0.5, "correct": p == "cat", "thumbnail": png()} for p in ("cat", EVIL)
    ]
    figure = Figure()
    figure.add_subplot().set_title(EVIL)
    matrix = [{"true class": "cat", "cat": 7, EVIL: 3}, {"true class": EVIL, "cat": 0, EVIL: 0}]
    tables = {"confusion": matrix, "predictions": examples, "per class": [{"class": EVIL, "recall": 0.75}]}
    save_result_extras(tmp_path, "shapes", 40, Result({"acc1": 0.4375}, 1000, "toy", tables, {EVIL: figure}))
    return tmp_path


DATA = {"pairs": {"shards": 12, "samples": 12345, "rows_per_step": 64, "epochs_seen": 1.5, "skipped": 60, "captions": [EVIL, "a red fox"]}}


def test_a_whole_run_has_every_section(whole: Path):
    page = read(write_report(whole, {"name": EVIL, "data": DATA, "device": "cpu"}))
    sections = ("Results", "Losses", "Learning rate and speed", "What the towers see", "Confusion matrix", "Example predictions", "Data")
    for expected in (*sections, "Skipped samples", "Recipe", "2.15", "a red fox", "12,345", "One sample per column"):
        assert expected in page.text
    assert "43.8 %" in page.text  # the last line counts, not the one of step 20
    assert "25.0 %" not in page.text
    assert "random weights 12.5 %" in page.text
    assert "7 of 10 right" in page.text
    assert "The first 50 of 60 rows." in page.text
    assert "step 1" in page.text  # the first picture, to compare with
    assert page.tags.count("svg") == 1 + 2 + 3 + 1 + 1 + page.text.count("log axis")  # over time, losses, speed, other, confusion


def test_strangers_strings_are_text(whole: Path):
    page = read(write_report(whole, {"name": EVIL, "data": DATA}))
    assert page.text.count("<script>alert(1)</script>") >= 6
    assert "<b>" in page.text  # the recipe's comment
    assert "alert(2)" not in " ".join(page.addresses)


def test_the_page_forbids_what_it_does_not_need(whole: Path):
    html = write_report(whole).read_text()
    assert "Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\"" in html
    assert not re.search(r"https?://", html)


def test_the_same_folder_gives_the_same_page(whole: Path):
    first = write_report(whole).read_bytes()
    assert write_report(whole).read_bytes() == first


def test_an_empty_run_says_so(tmp_path: Path):
    page = read(write_report(tmp_path, None))
    assert "No step was logged" in page.text
    assert "No evaluator has run" in page.text
    assert "svg" not in page.tags


def test_torn_and_broken_lines_do_not_stop_the_report(tmp_path: Path):
    lines(tmp_path / "metrics.jsonl", metric_lines(5))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('nonsense\n{"step": 6, "lo')
    lines(tmp_path / "results.jsonl", [{"name": "odd", "metrics": None}, {"metrics": {"acc1": "text", "acc5": None}}, {"step": "x"}])
    (tmp_path / "report").mkdir()
    for i, text in enumerate(
        ('{"torn', "[]", '{"name": "x", "tables": {"confusion": 5, "predictions": [1], "t": [{"a": 1}, 2]}, "figures": [1]}')
    ):
        (tmp_path / f"report/{i}.json").write_text(text)
    (tmp_path / "config.yaml").write_text("a: [1, 2\n")
    with pytest.warns(UserWarning, match="line 6"):
        page = read(write_report(tmp_path, {"data": "not a mapping"}))
    assert "a: [1, 2" in page.text
    assert "samples seen 320" in page.text


def test_values_that_are_not_finite_are_reported(tmp_path: Path):
    records = metric_lines(30)
    for i in (9, 10):
        records[i] |= {"loss": None, "clip/loss": math.nan}
    records[3] |= {"never": None}
    lines(tmp_path / "metrics.jsonl", records)
    page = read(write_report(tmp_path))
    assert "loss was not finite in 2 of 30 logged steps, first at step 10." in page.text
    assert "clip/loss was not finite in 2 of 30" in page.text
    assert "var(--bad)" in (tmp_path / "report.html").read_text()


def test_a_run_of_nothing_but_nan(tmp_path: Path):
    lines(tmp_path / "metrics.jsonl", [{**r, "loss": None, "clip/loss": None} for r in metric_lines(3)])
    assert "never finite" in read(write_report(tmp_path)).text


def test_thousands_of_steps_stay_small(tmp_path: Path):
    lines(tmp_path / "metrics.jsonl", metric_lines(20_000))
    path = write_report(tmp_path)
    assert path.stat().st_size < 500_000
    page = read(path)
    assert "steps 20,000" in page.text
    assert (page.text.count("log axis"), page.tags.count("input")) == (1, 1)  # clip/loss falls by a factor of 141, loss by less than 10


def test_waiting_for_data_and_results_no_better_than_chance_are_noted(tmp_path: Path):
    lines(tmp_path / "metrics.jsonl", [{**r, "data_wait_s": 0.05} for r in metric_lines(10)])
    result = {"step": None, "evaluator": "zero_shot", "name": "toy", "n": 10, "baselines": {"chance": 0.1}}
    lines(tmp_path / "results.jsonl", [{**result, "metrics": {"acc1": 0.1}}])
    text = read(write_report(tmp_path)).text
    assert "40 % of the time went into waiting for data" in text
    assert "toy: acc1 of 10.0 % is no better than chance (10.0 %)." in text
    ceiling = {"chance": 0.1, "supervised": 0.9}  # not reaching a ceiling is no warning
    lines(tmp_path / "results.jsonl", [{**result, "metrics": {"acc1": 0.11}, "baselines": ceiling}])
    assert "no better" not in read(write_report(tmp_path)).text


def test_baselines_are_found_beside_their_metric():
    line = {"metrics": {"acc1": 0.5, "random_acc1": 0.2, "random_seed": 1, "chance": 0.1}, "baselines": {"chance": {"acc5": 0.4}}}
    assert baselines_of(line) == {"acc1": {"random": 0.2, "chance": 0.1}, "acc5": {"chance": 0.4}}


def test_headline_folds_baselines_and_bounds_into_their_metric():
    metrics = {"acc1": 0.5, "acc1_low": 0.45, "acc1_high": 0.55, "random_acc1": 0.25, "median_rank": 3.0}
    (group,) = headline([{"name": "a", "metrics": {"acc1": 0.1}}, {"name": "a", "step": 2, "metrics": metrics}])
    assert [row["metric"] for row in group["rows"]] == ["acc1", "median_rank"]
    assert group["rows"][0]["interval"] == "45.0 % to 55.0 %"
    assert group["rows"][0]["baselines"] == [{"name": "random weights", "text": "25.0 %", "at": 25.0}]
    assert (group["rows"][0]["bar"], group["rows"][1]["bar"], group["rows"][1]["text"]) == (50.0, None, "3")


def test_chance_is_put_beside_results_where_it_is_known():
    results = [
        {"name": "photos", "n": 100, "metrics": {"acc1": 0.5, "acc5": 0.9, "mean_per_class_recall": 0.4, "random_acc1": 0.3}},
        {"name": "captions", "n": 50, "metrics": {"binding_acc": 0.9, "image_retrieval_recall@5": 0.5, "median_rank": 4}},
        {"name": "told", "metrics": {"acc1": 0.5}, "baselines": {"chance": 0.4}},
        {"name": "unknown", "metrics": {"acc1": 0.5}},
    ]
    found = headline(results, {"photos": 4, "told": 10})
    beside = [{row["metric"]: {b["name"]: b["at"] for b in row["baselines"]} for row in group["rows"]} for group in found]
    assert beside == [
        {"acc1": {"random weights": 30.0, "chance": 25.0}, "acc5": {}, "mean_per_class_recall": {"chance": 25.0}},
        {"binding_acc": {"chance": 50.0}, "image_retrieval_recall@5": {"chance": 10.0}, "median_rank": {}},
        {"acc1": {"chance": 40.0}},
        {"acc1": {}},
    ]


def test_the_tables_of_our_evaluators_find_their_place(tmp_path: Path):
    png_bytes = base64.b64decode(png())
    matrix = [{"true class": "a", "a": 3, "b": 1}, {"true class": "b", "a": 0, "b": 2}]
    example = {"image": png_bytes, "key": "0/1", "label": "a", "predicted": "b", "score": 0.25, "right": False}
    tables = {
        "confusion_matrix": matrix,
        "features_confusion_matrix": matrix,
        "confusions": [{"class": "a", "predicted": "b", "count": 1, "fraction": 0.25}],
        "examples": [example],
        "loss": [{"step": s, "loss": 1 / s} for s in range(1, 40)],
        "per_class": [{"class": "a", "n": 4, "recall": 0.75}],
    }
    save_result_extras(tmp_path, "probe", None, Result({}, 6, "toy", tables))
    save_result_extras(
        tmp_path, "captions", None, Result({}, 6, "toy", {"examples": [{"text": "a fox", "key": "0/2", "rank_of_image": 3}]})
    )
    page = read(write_report(tmp_path))
    expected = ("Confusion matrix", "Features confusion matrix", "probe: loss", "b 0.25 is a", "75.0 %", "a fox", "rank_of_image")
    for words in expected:
        assert words in page.text
    assert "fraction" not in page.text  # the matrix's own list says the same
    assert f"data:image/png;base64,{png()}" in page.addresses


def test_a_confusion_table_by_hand():
    found = confusion([{"true class": "a", "a": 3, "b": 1}, {"true class": "b", "a": 0, "b": 2}])
    assert found is not None
    assert (found["classes"], found["counts"].tolist(), found["n"], found["right"]) == (["a", "b"], [[3, 1], [0, 2]], 6, 5)
    assert found["top"] == [{"true": "a", "predicted": "b", "count": 1, "share": "25 %"}]


@pytest.mark.parametrize(
    "rows", [[], None, 5, [{"x": 1}], [5], {"true class": "a"}, [{"true class": "a"}], [{"true class": "a", "a": "x"}]]
)
def test_other_tables_are_no_confusion(rows: Any):
    assert confusion(rows) is None


def test_a_hundred_classes_are_drawn_without_names():
    svg = heat_map([f"class{i}" for i in range(100)], np.eye(100), "big")
    assert "class1" not in svg
    assert len(svg) < 60_000
    assert "class1" in heat_map(["class1", "class2"], np.eye(2), "small")


def test_predictions_keep_some_of_both_sides():
    rows = [{"truth": i, "correct": i % 4 == 0} for i in range(100)]
    found = predictions(rows, each=5)
    assert [p["truth"] for p in found["right"]] == [0, 4, 8, 12, 16]
    assert [p["truth"] for p in found["wrong"]] == [1, 2, 3, 5, 6]
    assert (found["num_right"], found["num_wrong"]) == (25, 75)


@pytest.mark.parametrize("bad", [None, 5, "", "not base64!", "data:nothing", base64.b64encode(b"<svg onload=x>").decode(), "é"])
def test_only_png_and_jpeg_become_thumbnails(bad: Any):
    assert thumbnail(bad) is None
    assert thumbnail(png()) == thumbnail("data:image/png;base64," + png()) == "data:image/png;base64," + png()


def test_extras_are_read_back_the_newest_of_each_name(tmp_path: Path):
    def save(name: str, step: int | None, value: Any) -> None:
        assert save_result_extras(tmp_path, name, step, Result({}, 1, "d", {"t": [{"value": value}]})) is not None

    save("a/b", 100, torch.tensor(2.0))
    save("a/b", 20, 1.0)
    save("c", 100, 1)
    save("c", None, np.float32("nan"))
    assert [(e["name"], e["step"], e["tables"]["t"][0]["value"]) for e in load_extras(tmp_path)] == [("a/b", 100, 2.0), ("c", None, None)]
    assert save_result_extras(tmp_path, "empty", 1, Result({"acc1": 1.0}, 1)) is None


def test_figures_stay_in_the_folder(tmp_path: Path):
    (tmp_path / "secret.svg").write_text("<svg/>")
    (tmp_path / "report").mkdir()
    (tmp_path / "report/a-00000001.json").write_text('{"name": "a", "step": 1, "figures": {"f": "../secret.svg"}, "tables": {}}')
    assert load_extras(tmp_path)[0]["figures"] == {}


def test_smoothing_has_no_lag_and_passes_over_gaps():
    line = np.arange(50.0)
    assert np.allclose(smooth(line, 9), line)
    holed = np.where(np.arange(50) == 25, np.nan, line)
    assert np.abs(smooth(holed, 9) - line).max() == pytest.approx(0.5)  # where four values lie on one side, five on the other
    assert np.isnan(smooth(np.full(3, np.nan), 3)).all()


def test_thinning_keeps_spikes():
    y = np.zeros(100_000)
    y[54_321], y[60_000], y[70_000] = 9, -9, np.nan
    x, kept = thin(np.arange(100_000.0), y)
    assert len(x) <= 800
    assert (np.nanmax(kept), np.nanmin(kept)) == (9, -9)
    assert (np.diff(x) > 0).all()


def test_log_axis_only_where_it_helps():
    assert suits_log([1, 5, 100])
    assert not suits_log([1, 2, 3])
    assert not suits_log([0, 5, 100])
    assert not suits_log([float("nan")] * 5)
    svg = curves({"a": ([1, 2, 3], [0.1, 1, 10])}, "a", log_y=True)
    assert all(f">{tick}<" in svg for tick in ("0.1", "1", "10"))
    assert "$" not in svg


def test_chart_labels_are_escaped_and_dollars_are_dollars():
    svg = curves({EVIL: ([1, 2], [1, 2]), "$x_{": ([1, 2], [2, 1])}, EVIL)
    assert "<script" not in svg
    assert "$x_{" in svg
    assert "&lt;script" in svg


def test_costs_that_an_older_version_measured_are_no_obstacle():
    line = {"step": 5, "cost_s": 2.0, "a/cost_alone_s": 1.0, "a/cost_without_s": 1.5, "b/cost_alone_s": 1.0}
    shown = str(costs([line]))
    assert "25 %" in shown
    assert "'b'" not in shown


def test_what_measuring_costs_is_a_share_of_the_steps(tmp_path: Path):
    probe = {"step": 40, "samples_seen": 2560, "cost_s": 0.1, "cost_probe_s": 0.05}
    lines(tmp_path / "metrics.jsonl", [*metric_lines(40), probe])  # 40 steps of 0.125 s
    assert "measuring costs adds 1.0 %" in read(write_report(tmp_path)).text
