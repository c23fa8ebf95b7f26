"""Score a folder of images against texts with a trained model.

    python examples/score_folder.py RUN_OR_MODEL FOLDER "a red circle" "a blue square" ...

Prints a line for each image, tab-separated: its path, then its cosine similarity to each text. RUN_OR_MODEL is what scripts/evaluate.py
takes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from mmpretrain.checkpoint import find_checkpoint
from mmpretrain.data.decode import ImageLimits, decode_image
from mmpretrain.data.folders import is_image, walk
from mmpretrain.data.schema import BadSample
from mmpretrain.errors import MMPretrainError
from mmpretrain.evaluators.features import center_view
from mmpretrain.evaluators.models import load_model
from mmpretrain.functional import unit
from mmpretrain.types import Model

BATCH = 64


def images_in(folder: Path) -> list[Path]:
    return [folder / name for name in walk(folder) if is_image(str(folder / name))]


def score(model: Model, paths: list[Path], texts: list[str]) -> dict[Path, Tensor]:
    """Path -> cosine similarities [n] to the texts. An image that cannot be decoded is named on stderr and left out."""
    words = model.texts(texts)
    if words is None:
        raise SystemExit("this model has no text tower")
    words = unit(words)  # [n, E]
    view, limits = center_view(model), ImageLimits()
    scores: dict[Path, Tensor] = {}
    for start in range(0, len(paths), BATCH):
        kept, pixels = [], []
        for path in paths[start : start + BATCH]:
            try:
                pixels.append(view.geometry(decode_image(path.read_bytes(), limits), {}))
                kept.append(path)
            except BadSample as error:
                print(f"{path}: {error}", file=sys.stderr)
        if kept:
            features = model.images(view.render(torch.stack(pixels), {}).data).features
            if features is None:
                raise SystemExit("this model has no joint space of images and texts: no contrastive objective trained it")
            scores |= dict(zip(kept, unit(features) @ words.T, strict=True))
    return scores


if __name__ == "__main__":
    run, folder, *texts = sys.argv[1:]
    try:
        scores = score(load_model(run, find_checkpoint=find_checkpoint), images_in(Path(folder)), texts)
    except MMPretrainError as error:
        raise SystemExit(f"error: {error}") from None
    print("image", *texts, sep="\t")
    for path, similarities in scores.items():
        print(path, *(f"{value:.4f}" for value in similarities.tolist()), sep="\t")
