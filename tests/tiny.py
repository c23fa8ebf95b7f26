"""Models and batches small enough to differentiate in float64, shared by tests."""

from __future__ import annotations

import torch

from mmpretrain import rng
from mmpretrain.assembly import copy_heads
from mmpretrain.config.build import build
from mmpretrain.model import PretrainModel, with_mask_embeddings
from mmpretrain.objectives import OBJECTIVES, Context
from mmpretrain.objectives.base import source_encodes
from mmpretrain.towers.dual import DualEncoder
from mmpretrain.towers.specs import build_towers
from mmpretrain.towers.teacher import Teacher
from mmpretrain.types import Batch, Rows, Sample, View

MODEL = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 16, "patch_size": 4, "width": 16, "layers": 2, "head_width": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
OPTIONS = {  # what makes an objective small; others have small defaults
    "dino": {"prototypes": 24, "hidden": 20, "bottleneck": 8, "local_crops": 2, "local_size": 8, "freeze_last_layer": 0.0},
    "mae": {"width": 16, "layers": 1, "heads": 2},
}
WORDS = ["a red circle", "two blue squares on grass", "one", "a striped star left of a very large dotted ring", "nothing at all"]


def towers(seed: int = 0, **vision) -> DualEncoder:
    torch.manual_seed(seed)
    return build_towers(MODEL | {"vision_cfg": MODEL["vision_cfg"] | vision})


def context(dual: DualEncoder, **changes) -> Context:
    known = {
        "image_size": 16, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "patch_size": 4, "image_width": 16, "text_width": 16,
        "embed_dim": 12, "context_length": 16, "vocab_size": 49408,
    }  # fmt: skip
    return Context(**(known | changes))


def model(objectives: dict[str, dict], seed: int = 0, double: bool = True, momentum: float | None = None, **vision) -> PretrainModel:
    """Objectives by name, `source` defaulting to "pairs"; `vision` changes the image tower.

    `momentum` adds a teacher, as does an objective that wants one.
    """
    dual = towers(seed, **vision)
    built, weights = {}, {}
    for name, options in objectives.items():
        kind = OBJECTIVES[options.get("kind", name)]
        torch.manual_seed(seed)
        config = build(kind.Config, {"source": "pairs", **OPTIONS.get(options.get("kind", name), {}), **options})
        built[name], weights[name] = kind(config, context(dual)), config.weight
    with_mask_embeddings(dual, built.values(), seed)
    teacher = None
    if momentum is None and any(e.network == "teacher" for o in built.values() for e in source_encodes(o.needs)):
        momentum = 0.9
    if momentum is not None:
        teacher = Teacher(dual, momentum, momentum, "constant", [pair for o in built.values() for pair in copy_heads(o)])
    result = PretrainModel(dual, built, weights, None if teacher is None else teacher.module)
    return result.double() if double else result


def rows(source: str, specs, count: int, start: int = 0, double: bool = True) -> Rows:
    """`count` random pictures with captions, rendered through the real view specs; row i depends on start + i alone."""
    samples = []
    for i in range(start, start + count):
        generator = torch.Generator().manual_seed(i + 1000 * len(source))
        image = torch.randint(0, 256, (3, 20, 24), generator=generator, dtype=torch.uint8)
        samples.append(Sample(f"{source}/{i}", image, [WORDS[i % len(WORDS)], WORDS[(i + 2) % len(WORDS)]]))
    seeds = rng.combine(len(source), torch.arange(start, start + count))
    views = {}
    for spec in specs:
        params = spec.draw(samples, seeds)
        cut = [
            spec.geometry(s.image if spec.modality == "image" else s.captions, {k: v[i] for k, v in params.items()})
            for i, s in enumerate(samples)
        ]
        view = spec.render(torch.stack(cut), params)
        views[spec] = View(view.data.double() if double and view.data.is_floating_point() else view.data, view.target)
    return Rows([s.key for s in samples], seeds, {}, views)


def batch(pretrain: PretrainModel, count: int = 8, start: int = 0, double: bool = True) -> Batch:
    return {source: rows(source, specs, count, start, double) for source, specs in pretrain.views().items()}


def gradients(pretrain: PretrainModel) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in pretrain.named_parameters() if p.grad is not None}
