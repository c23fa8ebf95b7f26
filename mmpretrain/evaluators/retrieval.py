"""The evaluator `retrieval`: image-text recall@k in both directions, with several captions per image, computed in tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import normalize

from mmpretrain import distributed
from mmpretrain.errors import UnsuitableModelError
from mmpretrain.evaluators.data.datasets import DataConfig, first_items, open_dataset
from mmpretrain.evaluators.features import NO_FEATURES, encode_images, encode_texts, part
from mmpretrain.evaluators.metrics import TIE
from mmpretrain.types import Model, Result


@dataclass
class Config(DataConfig):
    """Options of `retrieval`."""

    tile: int = 4096  # queries and candidates compared at once: memory grows with its square
    examples: int = 8  # texts to show in the report with the rank of their image


class Retrieval:
    """image_retrieval_recall@k: texts whose image is among the k best; text_retrieval_recall@k: images with an own caption there.

    They are defined as in CLIP_benchmark, except that ties count against the model (there, the order of top-k
    decides).
    """

    Config = Config

    def __init__(self, config: Config) -> None:
        self.config = config

    def preflight(self) -> None:
        """Check the first items."""
        first_items(self.config, "retrieval")

    def __call__(self, model: Model, accelerator: Accelerator) -> Result:
        config = self.config
        dataset = open_dataset(config, "retrieval")
        encoded = encode_images(model, dataset, accelerator, config)
        if "features" not in encoded.values:
            raise UnsuitableModelError(NO_FEATURES.format("retrieval"))
        used = [dataset.items[row] for row in encoded.rows.tolist()]
        texts = [caption for item in used for caption in item.captions]
        owner = torch.tensor([i for i, item in enumerate(used) for _ in item.captions])  # text -> image
        text = encode_texts(model, texts, accelerator, config.batch_size * 4).to(accelerator.device)
        image = normalize(encoded.values["features"], dim=-1).to(accelerator.device)
        image_rank, text_rank = retrieval_ranks(image, text, owner.to(accelerator.device), config.tile)
        metrics = {f"image_retrieval_recall@{k}": (image_rank < k).double().mean().item() for k in (1, 5, 10)}
        metrics |= {f"text_retrieval_recall@{k}": (text_rank < k).double().mean().item() for k in (1, 5, 10)}
        tables = {}
        if config.examples:
            step = max(1, len(texts) // config.examples)
            tables["examples"] = [
                {"text": texts[i], "key": used[int(owner[i])].key, "rank_of_image": int(image_rank[i]) + 1}
                for i in range(0, len(texts), step)
            ][: config.examples]
        if skipped := dataset.skipped + encoded.skipped:
            tables["skipped"] = skipped
        return Result(metrics, len(used), dataset.name, tables)


def retrieval_ranks(image: Tensor, text: Tensor, owner: Tensor, tile: int = 4096, tie: float = TIE) -> tuple[Tensor, Tensor]:
    """Rank the images of each text, and the texts of each image; 0 = best, the same on every process.

    Args:
        image: [N, E], normalised.
        text: [M, E], normalised.
        owner: int64 [M], the image of each text.
        tile: queries and candidates compared at once.
        tie: scores closer than this are equal.

    Returns:
        (int64 [M]: images that score at least as high for a text as its own; int64 [N]: texts of other images that
        score at least as high for an image as the best of its own). An image without a text ranks last.
    """
    everything = torch.arange(len(image), device=image.device)
    image_rank = _ranks(text, owner, image, everything, tile, tie)
    text_rank = _ranks(image, everything, text, owner, tile, tie)
    return image_rank, text_rank


def _ranks(query: Tensor, query_id: Tensor, key: Tensor, key_id: Tensor, tile: int, tie: float) -> Tensor:
    """Count, for each query, the keys of another id that do not score lower than the best of its own; all keys without an own one."""
    ranks = torch.zeros(len(query), dtype=torch.int64, device=query.device)
    mine = part(len(query))
    for start in range(mine.start, mine.stop, tile):
        rows = slice(start, min(start + tile, mine.stop))
        best = query.new_full((rows.stop - rows.start,), float("-inf"))
        for columns in (slice(i, i + tile) for i in range(0, len(key), tile)):
            own = query_id[rows, None] == key_id[None, columns]  # [tile,tile]
            scores = (query[rows] @ key[columns].T).masked_fill(~own, float("-inf"))
            best = torch.maximum(best, scores.amax(1))
        for columns in (slice(i, i + tile) for i in range(0, len(key), tile)):
            other = query_id[rows, None] != key_id[None, columns]
            scores = query[rows] @ key[columns].T
            ranks[rows] += (other & ~(scores < best[:, None] - tie)).sum(1)  # not `>=`, which a NaN never is
        ranks[rows] = torch.where(best.isfinite(), ranks[rows], len(key))
    return distributed.all_reduce_sum(ranks) if distributed.world_size() > 1 else ranks
