"""What `dedup` found, as plain data: counts, clusters with their keys, and what training and evaluation share."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import asdict
from typing import Any

import numpy as np
from jinja2 import Environment

from data_prep.copies import RULES
from data_prep.dedup.find import Found
from data_prep.perceptual import decoded
from data_prep.shards.read import Shard
from data_prep.subset import Numbering, Selection
from data_prep.thumbnails import thumbnail

IN_EVALUATION = "in_evaluation"


def named(found: Found) -> dict[int, str]:
    """shard/key of every sample that is reported; ascending, so each shard's keys are read once."""
    samples = {*found.dropped.tolist(), *found.copies.of[found.dropped].tolist()}
    samples |= set(found.bad) | {sample for sample, _ in found.not_embedded}
    return {sample: found.samples.key(sample) for sample in sorted(samples)}


def reason(found: Found, sample: int, names: dict[int, str]) -> tuple[str, str]:
    """(rule, detail) of a dropped training sample."""
    copies = found.copies
    rule, value, of = RULES[copies.rule[sample]], float(copies.value[sample]), int(copies.of[sample])
    measured = {"near": f" (difference {value:.1f} of 255)", "embedding": f" (cosine {value:.4f})"}.get(rule, "")
    if of >= found.training:
        return IN_EVALUATION, f"{rule} copy of {names[of]}{measured}"
    return f"{rule}_copy", f"of {names[of]}{measured}"


def selection(found: Found, names: dict[int, str]) -> Selection:
    """What to leave out of the training shards: copies, and samples whose image cannot be judged."""
    training = Numbering(found.training_names)
    training.counts = found.samples.counts[: len(found.training_names)]
    result = Selection(training)
    for sample in found.dropped.tolist():
        result.drop(sample, *reason(found, sample, names))
    for sample, (rule, detail) in found.bad.items():
        if sample < found.training:
            result.drop(sample, rule, detail)
    return result


def report(found: Found, names: dict[int, str]) -> dict[str, Any]:
    """The report; `good + dropped = samples`."""
    training, total = found.training, len(found.signatures)
    dropped = found.dropped.tolist()
    reasons = {sample: reason(found, sample, names) for sample in dropped}
    counts = Counter(rule for rule, _ in reasons.values())
    unusable = Counter(found.bad[sample][0] for sample in found.bad if sample < training)
    copies: dict[int, list[dict[str, str]]] = defaultdict(list)
    for sample, (rule, detail) in reasons.items():
        copies[int(found.copies.of[sample])].append({"sample": names[sample], "rule": rule, "detail": detail})
    clusters = [{"kept": names[of], "evaluation": of >= training, "dropped": several} for of, several in copies.items()]
    result = {
        "options": asdict(found.options),
        "samples": training,
        "good": training - len(dropped) - sum(unusable.values()),
        "dropped": dict(sorted((counts + unusable).items())),
        "clusters": sorted(clusters, key=lambda cluster: -len(cluster["dropped"])),
    }
    if found.damage:
        result["damage"] = found.damage
    if found.not_embedded:
        result["not_embedded"] = [{"sample": names[s], "reason": why} for s, why in found.not_embedded]
    if total > training:
        twins = found.copies.twin[training:]
        shared = np.flatnonzero(np.isin(twins, found.copies.of[found.dropped])) + training
        shard = found.samples.shards_of(shared)
        result["evaluation"] = {
            "samples": total - training,
            "in_training": len(shared),
            "unusable": dict(Counter(found.bad[sample][0] for sample in found.bad if sample >= training)),
            "shards": {found.samples.names[number]: int((shard == number).sum()) for number in np.unique(shard).tolist()},
        }
    return result


CLUSTERS, MEMBERS, SIDE = 200, 8, 128  # shown at most; the JSON report has them all

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Copies</title><style>
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em }
section { border-top: 1px solid #bbb; display: flex; flex-wrap: wrap; gap: 1em; padding: 1em 0 }
figure { margin: 0; width: {{ side }}px } img { max-width: 100%; border: 1px solid #ddd }
figcaption { font-size: 11px; overflow-wrap: anywhere } .kept { color: #06622b } small { color: #666 }
</style></head><body><h1>Copies</h1>
<p>{{ result.samples }} samples, {{ result.good }} good; dropped:
{% for rule, count in result.dropped.items() %}{{ count }} {{ rule }}{{ ", " if not loop.last }}{% else %}none{% endfor %}.
{% if result.evaluation %}{{ result.evaluation.in_training }} of {{ result.evaluation.samples }} evaluation samples have a copy in training.{% endif %}
{% if clusters|length < result.clusters|length %}The {{ clusters|length }} largest of {{ result.clusters|length }} clusters are shown.{% endif %}</p>
{% for cluster in clusters %}<section>{% for each in cluster.shown %}<figure>
<img alt="" src="{{ each.image }}"><figcaption><b class="{{ each.role }}">{{ each.role }}</b> {{ each.detail }}<br>{{ each.key }}<br><small>{{ each.shard }}</small></figcaption>
</figure>{% endfor %}{% if cluster.more %}<p>and {{ cluster.more }} more</p>{% endif %}</section>{% endfor %}
</body></html>
"""  # noqa: E501


def _thumbnail(found: Found, sample: int) -> str:
    place = found.samples.place(sample)
    with Shard(place.shard) as shard:
        return thumbnail(decoded(shard, place.index), SIDE, "PNG")


def _figure(found: Found, sample: int, role: str, name: str, detail: str) -> dict[str, str]:
    shard, _, key = name.rpartition(".tar/")
    return {"image": _thumbnail(found, sample), "role": role, "detail": detail, "key": key, "shard": f"{shard}.tar"}


def render(found: Found, result: dict[str, Any], names: dict[int, str]) -> str:
    """The page; text from shards is escaped."""
    sample_of = {name: sample for sample, name in names.items()}
    clusters = []
    for cluster in result["clusters"][:CLUSTERS]:
        kept = cluster["kept"]
        members = [("evaluation" if cluster["evaluation"] else "kept", kept, "")]
        for each in cluster["dropped"]:  # the copy that they are of stands beside them
            members.append(("dropped", each["sample"], f"{each['rule']} {each['detail'].replace(f'of {kept}', '')}"))
        shown = [_figure(found, sample_of[name], role, name, detail) for role, name, detail in members[:MEMBERS]]
        clusters.append({"shown": shown, "more": len(members) - len(shown)})
    template = Environment(autoescape=True, trim_blocks=True).from_string(PAGE)
    return template.render(result=result, clusters=clusters, side=SIDE)
