"""The clusters that `dedup` found, side by side: a self-contained HTML page, to judge thresholds by."""

from __future__ import annotations

import base64
import io
from typing import Any

from jinja2 import Environment
from PIL import Image

from data_prep.dedup_find import Found
from data_prep.dedup_signatures import decoded
from data_prep.samples import Shard

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
<img alt="" src="data:image/png;base64,{{ each.image }}"><figcaption><b class="{{ each.role }}">{{ each.role }}</b> {{ each.detail }}<br>{{ each.key }}<br><small>{{ each.shard }}</small></figcaption>
</figure>{% endfor %}{% if cluster.more %}<p>and {{ cluster.more }} more</p>{% endif %}</section>{% endfor %}
</body></html>
"""  # noqa: E501


def _thumbnail(found: Found, sample: int) -> str:
    name, at = found.place(sample)
    with Shard(name) as shard:
        image = Image.fromarray(decoded(shard, at))
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


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
