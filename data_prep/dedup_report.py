"""What `dedup` found, as plain data: counts, clusters with their keys, and what training and evaluation share."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from data_prep.dedup_clusters import RULES
from data_prep.dedup_find import Found
from data_prep.filter_keep import Part

IN_EVALUATION = "in_evaluation"


def _members(found: Found) -> dict[int, list[int]]:
    """Root -> members, of the clusters with a dropped training sample."""
    touched = np.unique(found.roots[: found.training][found.dropped])
    inside = np.flatnonzero(np.isin(found.roots, touched))
    clusters: dict[int, list[int]] = defaultdict(list)
    for sample in inside.tolist():
        clusters[int(found.roots[sample])].append(sample)
    return clusters


def named(found: Found) -> dict[int, str]:
    """shard/key of every sample that is reported; ascending, so each shard's keys are read once."""
    samples = {sample for members in _members(found).values() for sample in members}
    samples |= set(found.bad) | {sample for sample, _ in found.not_embedded}
    return {sample: found.where(sample) for sample in sorted(samples)}


def _value(found: Found, sample: int) -> str:
    rule, value = RULES[found.clusters.rule[sample]], float(found.clusters.value[sample])
    return {"near": f" (difference {value:.1f} of 255)", "embedding": f" (cosine {value:.4f})"}.get(rule, "")


def reason(found: Found, sample: int, names: dict[int, str]) -> tuple[str, str]:
    """(rule, detail) of a dropped training sample."""
    held = int(found.evaluated[sample])
    if held >= 0:
        partner = int(found.clusters.partner[sample])
        held = partner if partner >= found.training else held
        return IN_EVALUATION, f"{RULES[found.clusters.rule[sample]]}{_value(found, sample)} copy of {names[held]}"
    of = int(found.clusters.partner[sample])
    kept = int(found.kept[sample])
    instead = "" if of == kept else f"; kept is {names[kept]}"
    return f"{RULES[found.clusters.rule[sample]]}_copy", f"of {names[of]}{_value(found, sample)}{instead}"


def parts(found: Found, names: dict[int, str]) -> Iterator[Part]:
    """What to leave out of each training shard: copies, and samples whose image cannot be judged."""
    for shard in range(found.training_shards):
        start, stop = int(found.starts[shard]), int(found.starts[shard + 1])
        drops = {sample - start: reason(found, sample, names) for sample in (np.flatnonzero(found.dropped[start:stop]) + start).tolist()}
        drops |= {sample - start: found.bad[sample] for sample in range(start, stop) if sample in found.bad}
        yield Part(found.names[shard], stop - start, tuple((at, *drops[at]) for at in sorted(drops)))


def report(found: Found, names: dict[int, str]) -> dict[str, Any]:
    """The report; `good + dropped = samples`."""
    training, total = found.training, len(found.signatures)
    dropped = np.flatnonzero(found.dropped).tolist()
    counts = Counter(reason(found, sample, names)[0] for sample in dropped)
    unusable = Counter(found.bad[sample][0] for sample in found.bad if sample < training)
    clusters = []
    for members in _members(found).values():
        trained, held = [s for s in members if s < training], [s for s in members if s >= training]
        if not held:
            kept = [int(found.kept[trained[0]])]
        else:
            kept = []
        clusters.append(
            {
                "kept": [names[s] for s in kept],
                "dropped": [
                    {"sample": names[s], **dict(zip(("rule", "detail"), reason(found, s, names)))} for s in trained if s not in kept
                ],
                "evaluation": [names[s] for s in held],
            }
        )
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
        held = np.unique(found.roots[:training][found.dropped & (found.evaluated[:training] >= 0)])
        shared = np.flatnonzero(np.isin(found.roots[training:], held)) + training
        shard = np.searchsorted(found.starts, shared, side="right") - 1
        result["evaluation"] = {
            "samples": total - training,
            "in_training": len(shared),
            "unusable": dict(Counter(found.bad[sample][0] for sample in found.bad if sample >= training)),
            "shards": {found.names[number]: int((shard == number).sum()) for number in np.unique(shard).tolist()},
        }
    return result
