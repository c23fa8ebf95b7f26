"""What `dedup` found, as plain data: counts, clusters with their keys, and what training and evaluation share."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from data_prep import files
from data_prep.dedup_clusters import RULES
from data_prep.dedup_find import Found
from data_prep.filter_keep import Part

IN_EVALUATION = "in_evaluation"


def named(found: Found) -> dict[int, str]:
    """shard/key of every sample that is reported; ascending, so each shard's keys are read once."""
    samples = {*found.dropped.tolist(), *found.copies.of[found.dropped].tolist()}
    samples |= set(found.bad) | {sample for sample, _ in found.not_embedded}
    return {sample: found.where(sample) for sample in sorted(samples)}


def reason(found: Found, sample: int, names: dict[int, str]) -> tuple[str, str]:
    """(rule, detail) of a dropped training sample."""
    copies = found.copies
    rule, value, of = RULES[copies.rule[sample]], float(copies.value[sample]), int(copies.of[sample])
    measured = {"near": f" (difference {value:.1f} of 255)", "embedding": f" (cosine {value:.4f})"}.get(rule, "")
    if of >= found.training:
        return IN_EVALUATION, f"{rule} copy of {names[of]}{measured}"
    return f"{rule}_copy", f"of {names[of]}{measured}"


def _between(ascending: np.ndarray, start: int, stop: int) -> list[int]:
    return ascending[np.searchsorted(ascending, start) : np.searchsorted(ascending, stop)].tolist()


def parts(found: Found, names: dict[int, str]) -> Iterator[Part]:
    """What to leave out of each training shard: copies, and samples whose image cannot be judged."""
    for shard in range(found.training_shards):
        start, stop = int(found.starts[shard]), int(found.starts[shard + 1])
        drops = {sample - start: reason(found, sample, names) for sample in _between(found.dropped, start, stop)}
        drops |= {sample - start: found.bad[sample] for sample in range(start, stop) if sample in found.bad}
        yield Part(found.names[shard], stop - start, tuple((at, *drops[at]) for at in sorted(drops)), files.states([found.names[shard]]))


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
        shard = np.searchsorted(found.starts, shared, side="right") - 1
        result["evaluation"] = {
            "samples": total - training,
            "in_training": len(shared),
            "unusable": dict(Counter(found.bad[sample][0] for sample in found.bad if sample >= training)),
            "shards": {found.names[number]: int((shard == number).sum()) for number in np.unique(shard).tolist()},
        }
    return result
