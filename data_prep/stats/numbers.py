"""Numbers of the report as plain data, written by --json and shown on the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from data_prep import files
from data_prep.captions import CONTEXT, can_tell_languages
from data_prep.stats.collect import ASPECT_STEPS, BYTE_STEPS
from data_prep.stats.duplicates import Duplicates, Group
from data_prep.stats.summary import Frequent, Histogram, Names, Ref, Summary
from data_prep.stats.text import STOP_WORDS
from mmpretrain.data.schema import ShardError

SHOWN_GROUPS = 8


def spread(values: Histogram) -> dict[str, float | None]:
    """Returns quantiles and the mean of a histogram."""
    quantiles = {"min": 0.0, "p05": 0.05, "median": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
    return {name: values.quantile(share) for name, share in quantiles.items()} | {"mean": values.mean()}


def ranked(names: Names) -> dict[str, int]:
    """Sorts counts, the largest first."""
    return dict(sorted(names.items(), key=lambda item: (-item[1], item[0])))


def _distinct(counts: Frequent) -> dict[str, Any]:
    """Counts distinct items; `at_least`: rare ones were dropped; `missed`: by how much a count may be too low."""
    return {"distinct": len(counts.items), "at_least": counts.missed > 0, "missed": counts.missed, "total": counts.total}


def growth(words: Frequent, captioned: int, share: float, points: int = 40) -> list[tuple[float, int]]:
    """Computes the growth of the vocabulary, over samples in the order of their hashes.

    Args:
        words: the words, with the lowest hash of a sample that has each.
        captioned: samples with a caption.
        share: of the samples that were read.
        points: of the curve.

    Returns:
        (captioned samples, distinct words in them).
    """
    first = sorted(first for _, first, _ in words.items.values())
    if not first:
        return []
    # Hashes are uniform: a fraction of their range holds that fraction of the samples.
    span = share * 2.0**64
    curve, distinct = [], 0
    for i in range(1, points + 1):
        while distinct < len(first) and first[distinct] <= span * i / points:
            distinct += 1
        curve.append((captioned * i / points, distinct))
    return curve


def licences(names: Sequence[str]) -> list[dict[str, Any]]:
    """Reads licence, command and sample count from the manifest of each folder of shards."""
    folders: dict[str, int] = {}
    for name in names:
        folder = name.rpartition("/")[0] or "."
        folders[folder] = folders.get(folder, 0) + 1
    lines = []
    for folder, shards in folders.items():
        line: dict[str, Any] = {
            "folder": folder,
            "shards": shards,
            "manifest": False,
            "licence": None,
            "command": None,
            "num_samples": None,
            "problem": None,
        }
        try:
            manifest = json.loads(files.read_bytes(files.join(folder, "manifest.json")))
            line |= {"manifest": True} | {key: manifest.get(key) for key in ("licence", "command", "num_samples")}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, AttributeError, ShardError) as error:
            line["problem"] = f"manifest.json cannot be read: {error}"
        lines.append(line)
    return lines


def class_names(names: Sequence[str]) -> list[str] | None:
    """Reads classnames.txt beside the first shard; None without one."""
    folder = names[0].rpartition("/")[0] or "."
    try:
        lines = files.read_bytes(files.join(folder, "classnames.txt")).decode("utf-8", "replace").splitlines()
    except (OSError, ShardError):
        return None
    return [line.strip() for line in lines if line.strip()]


def class_counts(labels: Frequent, classes: list[str] | None) -> list[tuple[str, int]]:
    """Returns (class, samples), the largest first, including the classes of classnames.txt without samples."""

    def name(label: str) -> str:
        known = classes is not None and label.isdigit() and int(label) < len(classes)
        return classes[int(label)] if known and classes else label

    counts: dict[str, int] = dict.fromkeys(classes or [], 0)
    for label, (count, _, _) in labels.items.items():
        counts[name(label)] = counts.get(name(label), 0) + count
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _where(ref: Ref) -> dict[str, str]:
    return {"shard": ref.shard, "key": ref.key}


def _groups(groups: list[Group], cut: bool) -> dict[str, Any]:
    return {
        "groups": len(groups),
        "images": sum(group.count for group in groups),
        "superfluous": sum(group.count - 1 for group in groups),
        "of_a_sample": cut,
        "first": [{"count": group.count, "samples": [_where(ref) for ref in group.refs]} for group in groups[:50]],
    }


def numbers(s: Summary, names: Sequence[str], share: float, caption: str, label: str | None, duplicates: Duplicates) -> dict[str, Any]:
    """Converts a summary to plain data."""
    classes = class_names(names)
    counted = class_counts(s.labels, classes)
    repeated = [(text, count) for _, count, text in s.captions.top(50) if count > 1]
    text_total = s.characters.total()
    aspect = {name: None if v is None else round(2 ** (v / ASPECT_STEPS), 3) for name, v in spread(s.aspect).items() if name != "mean"}
    file_bytes = {name: None if v is None else int(2 ** (v / BYTE_STEPS)) for name, v in spread(s.file_bytes).items() if name != "mean"}
    top_words = [[word, n] for word, n, _ in s.words.top(60) if word not in STOP_WORDS][:30]
    data = {
        "shards": s.shards, "samples": s.samples, "looked_at": s.looked_at, "share": share, "tar_bytes": s.tar_bytes,
        "members": {name: {"samples": n, "bytes": s.member_bytes[name]} for name, n in ranked(s.members).items()},
        "repeated_keys": s.repeated_keys, "lost_about": s.lost, "problems": ranked(s.problems),
        "unreadable": [{"shard": name, "reason": reason, "detail": detail} for name, reason, detail in s.unreadable.sorted()],
        "bad": [_where(ref) | {"member": what, "reason": reason, "detail": detail} for ref, what, reason, detail in s.bad.sorted()],
        "images": {
            "found": s.formats.total(), "decoded": s.images, "formats": ranked(s.formats), "modes": ranked(s.modes), "misnamed": s.misnamed,
            "short_side": spread(s.short_side), "long_side": spread(s.long_side),
            "aspect": aspect,
            "bytes": file_bytes,
            "common_sizes": [[size, n] for size, n, _ in s.sizes.top(12)], "sizes": _distinct(s.sizes), "blank": s.blanks,
        },
        "captions": {
            "member": caption, "samples": s.captioned, "captions": text_total, "per_sample": spread(s.captions_per_sample),
            "characters": spread(s.characters), "tokens": spread(s.tokens),
            "over_context": sum(n for length, n in s.tokens.items() if length > CONTEXT), "context": CONTEXT,
            **{k: v for k, v in _distinct(s.captions).items() if k != "total"}, "repeated": repeated[:20],
            "in_repeats": sum(count for count, _, _ in s.captions.items.values() if count > 1), "json_captions": s.json_captions,
        },
        "vocabulary": {
            **_distinct(s.words), "total": s.num_words, "once": sum(count == 1 for count, _, _ in s.words.items.values()),
            "top": top_words, "growth": growth(s.words, s.captioned, share),
        },
        "languages": ranked(s.languages) if can_tell_languages() else None, "scripts": ranked(s.scripts),
        "labels": {
            "member": label, "samples": s.labelled, "classes": sum(n > 0 for _, n in counted), "empty": [c for c, n in counted if not n],
            "counts": counted, "names": classes,
        },
        "duplicates": {
            "exact": _groups(duplicates.exact, s.pictures.cut), "alike": _groups(duplicates.alike, s.pictures.cut),
            "superfluous": duplicates.superfluous,
        },
        "licences": licences(names),
    }  # fmt: skip
    return data
