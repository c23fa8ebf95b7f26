"""The page of `stats`: charts, thumbnails and notes, rendered by a template."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import jinja2

from data_prep import engine as engines
from data_prep.captions import CONTEXT, MIN_LETTERS
from data_prep.perceptual import DIFFERENCE, HASH_DISTANCE
from data_prep.shards.read import Shard, image_member, pixels
from data_prep.stats import charts as draw
from data_prep.stats.collect import ASPECT_STEPS, BLANK, BYTE_STEPS
from data_prep.stats.duplicates import Duplicates, Group
from data_prep.stats.numbers import SHOWN_GROUPS
from data_prep.stats.summary import MAX_ITEMS, Ref, Summary
from mmpretrain.data.schema import BadSample, ShardError
from mmpretrain.data.thumbnails import thumbnail_url

THUMB = 176  # pixels of the longer side


def thumbnails(task: tuple[str, tuple[int, ...]]) -> dict[int, str]:
    """The task of a worker: encodes thumbnails of the decodable samples among (shard, samples), as data: URLs by sample."""
    name, chosen = task
    thumbs: dict[int, str] = {}
    try:
        shard = Shard(name)
    except (ShardError, OSError):
        return thumbs
    with shard:
        for i in chosen:
            try:
                members = shard.read(i).members
                extension = image_member(members)
                if extension is None:
                    continue
                image = pixels(members[extension]).permute(1, 2, 0).numpy()
            except BadSample:
                continue
            thumbs[i] = thumbnail_url(image, THUMB, "JPEG", quality=82)
    return thumbs


def _chart(title: str, svg: str, beside: str = "") -> dict[str, str]:
    return {"title": title, "svg": svg, "beside": beside}


def _doublings(bins: Sequence[draw.Bin], text: Any) -> list[tuple[float, str]]:
    span = bins[-1].high - bins[0].low
    step = 1 if span >= 4 else 0.5 if span >= 2 else 0.25
    return [(i * step, text(2.0 ** (i * step))) for i in range(math.ceil(bins[0].low / step), math.floor(bins[-1].high / step) + 1)]


def image_charts(s: Summary, data: dict[str, Any]) -> list[dict[str, str]]:
    """Draws the charts of sizes, aspect ratios and bytes of the images."""
    if not s.short_side:
        return []
    charts = []
    for title, values, key in (("shorter side", s.short_side, "short_side"), ("longer side", s.long_side, "long_side")):
        if len(values) == 1:  # the list of sizes shows a single value already
            continue
        bins = draw.log_bins(
            values, 4, lambda side: math.log2(max(side, 1)), lambda a, b: f"{math.ceil(a)} to {max(math.ceil(b) - 1, math.ceil(a))} px"
        )
        beside = f"median {data['images'][key]['median']:,} px"
        charts.append(_chart(title, draw.histogram(bins, title, "pixels", _doublings(bins, lambda v: f"{v:,.0f}")), beside))
    if len(s.aspect) > 1:
        bins = draw.log_bins(
            s.aspect, ASPECT_STEPS // 2, lambda a: a / ASPECT_STEPS, lambda a, b: f"about {aspect_label(math.sqrt(a * b))}"
        )
        ticks = [
            (math.log2(r), t)
            for r, t in ((1 / 4, "1:4"), (1 / 2, "1:2"), (3 / 4, "3:4"), (1, "1:1"), (4 / 3, "4:3"), (16 / 9, "16:9"), (4, "4:1"))
        ]
        ticks += [(k, f"{2**k}:1") for k in range(3, 7)] + [(-k, f"1:{2**k}") for k in range(3, 7)]
        svg = draw.histogram(bins, "width to height", "tall · width : height · wide", sorted(ticks))
        charts.append(_chart("width to height", svg, f"median {aspect_label(data['images']['aspect']['median'])}"))
    bins = draw.log_bins(s.file_bytes, BYTE_STEPS, lambda b: b / BYTE_STEPS, lambda a, b: f"{size(a)} to {size(b)}")
    charts.append(
        _chart(
            "bytes of an image",
            draw.histogram(bins, "bytes", "bytes", _doublings(bins, size)),
            f"median {size(data['images']['bytes']['median'])}",
        )
    )
    return charts


def caption_charts(s: Summary, data: dict[str, Any]) -> list[dict[str, str]]:
    """Draws the charts of lengths, number and vocabulary of the captions."""
    if not s.characters:
        return []
    c = data["captions"]
    charts = [
        _chart(
            "characters of a caption",
            draw.histogram(draw.linear_bins(s.characters), "characters", "characters"),
            f"median {c['characters']['median']:,}",
        ),
        _chart(
            "CLIP tokens",
            draw.histogram(
                draw.linear_bins(s.tokens), "tokens", "tokens, begin and end among them", marks=[(CONTEXT + 1, f"CLIP reads {CONTEXT}")]
            ),
            f"median {c['tokens']['median']:,}, {percent(c['over_context'], c['captions'])} over {CONTEXT}",
        ),
    ]
    if len(s.captions_per_sample) > 1:
        svg = draw.histogram(draw.linear_bins(s.captions_per_sample), "captions of a sample", "captions")
        charts.append(_chart("captions of a sample", svg, f"mean {c['per_sample']['mean']:.2f}"))
    points = data["vocabulary"]["growth"]
    if points and points[-1][1] > 1:
        charts.append(
            _chart(
                "vocabulary",
                draw.curve(points, "distinct words", "captioned samples, in random order"),
                f"{points[-1][1]:,} distinct words",
            )
        )
    return charts


def ranking(items: Sequence[tuple[str, int]], total: int, max_rows: int) -> dict[str, Any]:
    """Builds rows of horizontal bars, relative to the longest."""
    top = max((n for _, n in items), default=1)
    rows = [{"name": name, "count": n, "share": percent(n, total), "bar": round(100 * n / max(top, 1), 1)} for name, n in items[:max_rows]]
    return {"rows": rows, "left": len(items) - len(rows)}


def classes(counts: Sequence[tuple[str, int]], total: int, max_rows: int = 40) -> list[dict[str, Any]]:
    """Ranks the classes by size; of many, the largest and the smallest non-empty ones."""
    if len(counts) <= max_rows:
        return [ranking(counts, total, max_rows) | {"title": "", "left": 0}]
    counts = [(name, n) for name, n in counts if n]
    largest, smallest = ranking(counts, total, max_rows // 2), ranking(counts[-max_rows // 2 :], total, max_rows // 2)
    for row in smallest["rows"]:  # one scale for both
        row["bar"] = round(100 * row["count"] / max(counts[0][1], 1), 1)
    return [
        largest | {"title": f"The {max_rows // 2} largest of {len(counts):,}", "left": 0},
        smallest | {"title": f"The {max_rows // 2} smallest"},
    ]


def _cards(items: Sequence[tuple[Any, ...]], thumbs: dict[Ref, str]) -> list[dict[str, Any]]:
    return [{"image": thumbs.get(item[0]), "key": item[0].key, "shard": item[0].shard, "text": item[1], "label": ""} for item in items]


def _strip(group: Group, thumbs: dict[Ref, str]) -> dict[str, Any]:
    return {"count": group.count, "cards": _cards([(ref, "") for ref in group.refs], thumbs)}


def render(s: Summary, data: dict[str, Any], duplicates: Duplicates, *, engine: str = "local", processes: int | None = None) -> str:
    """Renders the page; reads the shards again for the few images it shows."""
    worst = {
        "The smallest": s.smallest.sorted(), "The most elongated": s.elongated.sorted(), "Blank, or nearly": s.blank.sorted(),
    }  # fmt: skip
    if len(s.aspect) == 1:
        del worst["The most elongated"]
    if len(s.sizes.items) == 1:
        del worst["The smallest"]
    texts = {"The shortest captions": s.shortest.sorted(), "The longest captions": s.longest.sorted()[:6]}
    shown = {"exact": duplicates.exact[:SHOWN_GROUPS], "alike": duplicates.alike[:SHOWN_GROUPS]}
    wanted = {item[0] for group in (*worst.values(), *texts.values(), s.examples.sorted()) for item in group}
    wanted |= {ref for groups in shown.values() for group in groups for ref in group.refs}
    by_shard: dict[str, set[int]] = defaultdict(set)
    for ref in wanted:
        by_shard[ref.shard].add(ref.sample)
    tasks = [(name, tuple(sorted(chosen))) for name, chosen in sorted(by_shard.items())]
    results = engines.run(thumbnails, tasks, engine=engine, processes=processes, title="thumbnails")
    by_place = {(name, i): picture for (name, _), pictures in zip(tasks, results) for i, picture in pictures.items()}
    thumbs = {ref: by_place[ref.shard, ref.sample] for ref in wanted if (ref.shard, ref.sample) in by_place}
    labels = data["labels"]["counts"]

    def named(label: str | None) -> str:
        known = data["labels"]["names"]
        if known and label and label.isdigit() and int(label) < len(known):
            return known[int(label)]
        return f"class {label}" if label and label.isdigit() else label or ""

    languages = None if data["languages"] is None else [(k, n) for k, n in data["languages"].items() if k != "short"]
    examples = _cards([(ref, text) for ref, text, _ in s.examples.sorted()], thumbs)
    for card, (_, _, label) in zip(examples, s.examples.sorted()):
        card["label"] = named(label)
    context = {
        "d": data,
        "notes": notes(data),
        "image_charts": image_charts(s, data),
        "caption_charts": caption_charts(s, data),
        "formats": ranking(list(data["images"]["formats"].items()), data["images"]["found"], 12),
        "modes": ranking(list(data["images"]["modes"].items()), sum(data["images"]["modes"].values()), 12),
        "sizes": ranking(data["images"]["common_sizes"], data["images"]["found"], 12),
        "words": ranking(data["vocabulary"]["top"], data["captions"]["samples"], 20) | {"left": 0},
        "languages": None if languages is None else ranking(languages, data["captions"]["captions"], 12),
        "scripts": ranking(list(data["scripts"].items()), data["captions"]["captions"], 12),
        "classes": classes(labels, data["labels"]["samples"]) if data["labels"]["samples"] else [],
        "examples": examples,
        "worst": {title: _cards(items, thumbs) for title, items in worst.items() if items},
        "texts": {title: _cards(items, thumbs) for title, items in texts.items() if items},
        "shown": {kind: [_strip(group, thumbs) for group in groups] for kind, groups in shown.items()},
        "name": ", ".join(dict.fromkeys(line["folder"].rstrip("/").rpartition("/")[2] or line["folder"] for line in data["licences"])),
        "near": HASH_DISTANCE, "difference": DIFFERENCE, "max_items": MAX_ITEMS, "blank_below": BLANK, "min_letters": MIN_LETTERS,
    }  # fmt: skip
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.FileSystemLoader(Path(__file__).parent / "templates"), jinja2.FunctionLoader(_report_file)]),
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= {"n": lambda value: "–" if value is None else f"{value:,}", "size": size, "ratio": aspect_label}
    environment.globals["percent"] = percent
    # Lone surrogates in keys or captions cannot be written and become question marks.
    return environment.get_template("stats.html.jinja").render(context).encode("utf-8", "replace").decode()


def _report_file(name: str) -> str | None:
    """Loads a template of the reports of training runs, whose colours and fonts the page shares."""
    place = resources("mmpretrain").joinpath("report", name)
    return place.read_text(encoding="utf-8") if place.is_file() else None


def percent(part: float, whole: float) -> str:
    """Formats a percentage, never rounded to 0 or 100."""
    if not whole:
        return "–"
    share = 100 * part / whole
    if 0 < share < 0.1:
        return "< 0.1 %"
    if 99.9 < share < 100:
        return "> 99.9 %"
    return f"{share:.0f} %" if share >= 10 or share == int(share) else f"{share:.1f} %"


def size(value: float | None) -> str:
    """Formats a number of bytes."""
    if value is None:
        return "–"
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.0f} B"


def aspect_label(ratio: float | None) -> str:
    """Formats width / height, as in 1.5:1 or 1:2."""
    if ratio is None:
        return "–"
    return f"{ratio:.3g}:1" if ratio >= 1 else f"1:{1 / ratio:.3g}"


def notes(d: dict[str, Any]) -> list[str]:
    """Returns sentences on what a reader of the report should notice."""
    notes = []
    n, images, captions, labels = d["looked_at"], d["images"], d["captions"], d["labels"]
    if not d["samples"]:
        notes.append("There is no sample in these shards.")
    if d["unreadable"]:
        lost = f", with about {d['lost_about']:,} samples lost behind them" if d["lost_about"] else ""
        notes.append(f"{len(d['unreadable'])} shards or places in shards cannot be read{lost}: they are listed under “Problems”.")
    if bad := sum(count for reason, count in d["problems"].items() if not reason.startswith("shard: ")):
        notes.append(f"{bad:,} of {n:,} samples have a member that training would refuse; the reasons are under “Problems”.")
    if d["repeated_keys"]:
        notes.append(f"{d['repeated_keys']:,} keys come more than once within a shard: each is a sample of its own.")
    if n and not images["found"]:
        notes.append("No sample has an image.")
    elif images["found"] < n:
        notes.append(f"{n - images['found']:,} of {n:,} samples have no image.")
    if captions["samples"] and captions["samples"] < n:
        notes.append(f"{n - captions['samples']:,} of {n:,} samples have no usable caption in {captions['member']}.")
    if captions["over_context"] > 0.001 * captions["captions"]:
        notes.append(
            f"{percent(captions['over_context'], captions['captions'])} of the captions are longer than the {captions['context']} tokens "
            "that CLIP reads: their ends are never seen."
        )
    if captions["captions"] and captions["in_repeats"] > 0.05 * captions["captions"]:
        notes.append(
            f"{percent(captions['in_repeats'], captions['captions'])} of the captions are shared by several samples. In one batch these "
            "are counted as wrong answers for one another by contrastive losses."
        )
    if captions["json_captions"] > 0.5 * n:
        notes.append("The json members also hold “captions”: with --caption json:captions the page describes those.")
    superfluous = d["duplicates"]["superfluous"]
    if superfluous > 0.001 * max(images["found"], 1):
        notes.append(f"{superfluous:,} images are copies of others, of equal pixels or nearly. The command dedup removes them.")
    if images["blank"] > 0.001 * max(images["found"], 1):
        notes.append(f"{images['blank']:,} images are blank, or nearly.")
    if images["misnamed"]:
        notes.append(f"{images['misnamed']:,} images are of another format than their extension says; training goes by the content.")
    filled = [count for _, count in labels["counts"] if count]
    if labels["samples"] and filled and filled[0] >= 10 * filled[-1] and len(filled) <= 1000:
        notes.append(f"Classes are unbalanced: the largest has {filled[0]:,} samples, the smallest {filled[-1]:,}.")
    if labels["empty"]:
        notes.append(f"{len(labels['empty']):,} classes of classnames.txt have no sample here, such as {labels['empty'][0]}.")
    for line in d["licences"]:
        if not line["licence"]:
            notes.append(
                f"{line['folder']}: "
                + ("its manifest.json names no licence." if line["manifest"] else "there is no manifest.json, hence no known licence.")
            )
    if d["share"] < 1:
        notes.append(
            f"{n:,} of {d['samples']:,} samples were read, chosen by hashes of their keys and sizes; "
            "only the counts of samples, members and bytes are of all."
        )
    return notes
