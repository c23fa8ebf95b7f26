"""What a reader of the page should look at first, and how its numbers are written."""

from __future__ import annotations

from typing import Any


def percent(part: float, whole: float) -> str:
    """A few are never rounded to none, and most never to all."""
    if not whole:
        return "–"
    share = 100 * part / whole
    if 0 < share < 0.1:
        return "< 0.1 %"
    if 99.9 < share < 100:
        return "> 99.9 %"
    return f"{share:.0f} %" if share >= 10 or share == int(share) else f"{share:.1f} %"


def size(value: float | None) -> str:
    if value is None:
        return "–"
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.0f} B"


def aspect_label(ratio: float | None) -> str:
    if ratio is None:
        return "–"
    return f"{ratio:.3g}:1" if ratio >= 1 else f"1:{1 / ratio:.3g}"


def notes(d: dict[str, Any]) -> list[str]:
    found = []
    n, images, captions, labels = d["looked_at"], d["images"], d["captions"], d["labels"]
    if not d["samples"]:
        found.append("There is no sample in these shards.")
    if d["unreadable"]:
        lost = f", with about {d['lost_about']:,} samples lost behind them" if d["lost_about"] else ""
        found.append(f"{len(d['unreadable'])} shards or places in shards cannot be read{lost}: they are listed under “Problems”.")
    if bad := sum(count for reason, count in d["problems"].items() if not reason.startswith("shard: ")):
        found.append(f"{bad:,} of {n:,} samples have a member that training would refuse; the reasons are under “Problems”.")
    if d["repeated_keys"]:
        found.append(f"{d['repeated_keys']:,} keys come more than once within a shard: each is a sample of its own.")
    if n and not images["found"]:
        found.append("No sample has an image.")
    elif images["found"] < n:
        found.append(f"{n - images['found']:,} of {n:,} samples have no image.")
    if captions["samples"] and captions["samples"] < n:
        found.append(f"{n - captions['samples']:,} of {n:,} samples have no usable caption in {captions['member']}.")
    if captions["over_context"] > 0.001 * captions["captions"]:
        found.append(
            f"{percent(captions['over_context'], captions['captions'])} of the captions are longer than the {captions['context']} tokens "
            "that CLIP reads: their ends are never seen."
        )
    if captions["captions"] and captions["in_repeats"] > 0.05 * captions["captions"]:
        found.append(
            f"{percent(captions['in_repeats'], captions['captions'])} of the captions are shared by several samples. In one batch these "
            "are counted as wrong answers for one another by contrastive losses."
        )
    if captions["json_captions"] > 0.5 * n:
        found.append("The json members also hold “captions”: with --caption json:captions the page describes those.")
    exact = d["duplicates"]["exact"]
    if exact["superfluous"] > 0.001 * max(images["found"], 1):
        found.append(f"{exact['superfluous']:,} images are byte-identical copies of others. The command dedup removes them.")
    if images["blank"] > 0.001 * max(images["found"], 1):
        found.append(f"{images['blank']:,} images are blank, or nearly.")
    if images["misnamed"]:
        found.append(f"{images['misnamed']:,} images are of another format than their extension says; training goes by the content.")
    filled = [count for _, count in labels["counts"] if count]
    if labels["samples"] and filled and filled[0] >= 10 * filled[-1] and len(filled) <= 1000:
        found.append(f"Classes are unbalanced: the largest has {filled[0]:,} samples, the smallest {filled[-1]:,}.")
    if labels["empty"]:
        found.append(f"{len(labels['empty']):,} classes of classnames.txt have no sample here, such as {labels['empty'][0]}.")
    for line in d["licences"]:
        if not line["licence"]:
            found.append(
                f"{line['folder']}: "
                + ("its manifest.json names no licence." if line["manifest"] else "there is no manifest.json, hence no known licence.")
            )
    if d["share"] < 1:
        found.append(
            f"{n:,} of {d['samples']:,} samples were read, chosen by hashes of their keys and sizes; "
            "only the counts of samples, members and bytes are of all."
        )
    return found
