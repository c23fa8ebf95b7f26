"""The report of `dedup`: counts, clusters of copies, overlap of training and evaluation, and an HTML page of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import asdict
from typing import Any

import numpy as np
from jinja2 import Environment

from data_prep.copies import RULES
from data_prep.dedup.find import Findings
from data_prep.perceptual import decoded
from data_prep.shards.read import Shard
from data_prep.subset import Numbering, Selection
from mmpretrain.data.thumbnails import thumbnail_url

IN_EVALUATION = "in_evaluation"


def labels_of(findings: Findings) -> dict[int, str]:
    """Returns shard/key of every reported sample, in ascending order, so that the keys of a shard are read once."""
    samples = {*findings.dropped.tolist(), *findings.copies.of[findings.dropped].tolist()}
    samples |= set(findings.bad) | {sample for sample, _ in findings.not_embedded}
    return {sample: findings.samples.key(sample) for sample in sorted(samples)}


def reason(findings: Findings, sample: int, names: dict[int, str]) -> tuple[str, str]:
    """Returns (rule, detail) of a dropped training sample."""
    copies = findings.copies
    rule, value, of = RULES[copies.rule[sample]], float(copies.value[sample]), int(copies.of[sample])
    measured = {"near": f" (difference {value:.1f} of 255)", "embedding": f" (cosine {value:.4f})"}.get(rule, "")
    if of >= findings.training:
        return IN_EVALUATION, f"{rule} copy of {names[of]}{measured}"
    return f"{rule}_copy", f"of {names[of]}{measured}"


def selection(findings: Findings, names: dict[int, str]) -> Selection:
    """Selects the training samples to drop: copies, and samples without a usable image."""
    training = Numbering(findings.training_names)
    training.counts = findings.samples.counts[: len(findings.training_names)]
    result = Selection(training)
    for sample in findings.dropped.tolist():
        result.drop(sample, *reason(findings, sample, names))
    for sample, (rule, detail) in findings.bad.items():
        if sample < findings.training:
            result.drop(sample, rule, detail)
    return result


def report(findings: Findings, names: dict[int, str]) -> dict[str, Any]:
    """Builds the report as plain data; good + dropped = samples."""
    training, total = findings.training, len(findings.signatures)
    dropped = findings.dropped.tolist()
    reasons = {sample: reason(findings, sample, names) for sample in dropped}
    counts = Counter(rule for rule, _ in reasons.values())
    unusable = Counter(findings.bad[sample][0] for sample in findings.bad if sample < training)
    copies: dict[int, list[dict[str, str]]] = defaultdict(list)
    for sample, (rule, detail) in reasons.items():
        copies[int(findings.copies.of[sample])].append({"sample": names[sample], "rule": rule, "detail": detail})
    clusters = [{"kept": names[of], "evaluation": of >= training, "dropped": several} for of, several in copies.items()]
    result = {
        "options": asdict(findings.options),
        "samples": training,
        "good": training - len(dropped) - sum(unusable.values()),
        "dropped": dict(sorted((counts + unusable).items())),
        "clusters": sorted(clusters, key=lambda cluster: -len(cluster["dropped"])),
    }
    if findings.damage:
        result["damage"] = findings.damage
    if findings.not_embedded:
        result["not_embedded"] = [{"sample": names[s], "reason": why} for s, why in findings.not_embedded]
    if total > training:
        twins = findings.copies.twin[training:]
        shared = np.flatnonzero(np.isin(twins, findings.copies.of[findings.dropped])) + training
        shard = findings.samples.shards_of(shared)
        result["evaluation"] = {
            "samples": total - training,
            "in_training": len(shared),
            "unusable": dict(Counter(findings.bad[sample][0] for sample in findings.bad if sample >= training)),
            "shards": {findings.samples.names[number]: int((shard == number).sum()) for number in np.unique(shard).tolist()},
        }
    return result


MAX_CLUSTERS, MAX_MEMBERS, SIDE = 200, 8, 128  # on the page; the JSON report has them all

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


def _thumbnail(findings: Findings, sample: int) -> str:
    place = findings.samples.place(sample)
    with Shard(place.shard) as shard:
        return thumbnail_url(decoded(shard, place.index), SIDE, "PNG")


def _figure(findings: Findings, sample: int, role: str, name: str, detail: str) -> dict[str, str]:
    shard, _, key = name.rpartition(".tar/")
    return {"image": _thumbnail(findings, sample), "role": role, "detail": detail, "key": key, "shard": f"{shard}.tar"}


def render(findings: Findings, result: dict[str, Any], names: dict[int, str]) -> str:
    """Renders the page; text from shards is escaped."""
    sample_of = {name: sample for sample, name in names.items()}
    clusters = []
    for cluster in result["clusters"][:MAX_CLUSTERS]:
        kept = cluster["kept"]
        members = [("evaluation" if cluster["evaluation"] else "kept", kept, "")]
        for each in cluster["dropped"]:  # the sample that it is a copy of stands beside it
            members.append(("dropped", each["sample"], f"{each['rule']} {each['detail'].replace(f'of {kept}', '')}"))
        shown = [_figure(findings, sample_of[name], role, name, detail) for role, name, detail in members[:MAX_MEMBERS]]
        clusters.append({"shown": shown, "more": len(members) - len(shown)})
    template = Environment(autoescape=True, trim_blocks=True).from_string(PAGE)
    return template.render(result=result, clusters=clusters, side=SIDE)
