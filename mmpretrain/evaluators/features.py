"""Features of a data set under a model: decoding threads, division among processes, and an optional cache."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from mmpretrain import distributed
from mmpretrain.atomic import write_atomically
from mmpretrain.data.decode import ImageLimits, decode_image
from mmpretrain.data.schema import BadSample, BadSampleBudgetError
from mmpretrain.data.views import CenterView
from mmpretrain.errors import HangError, NotFiniteError, UnsuitableModelError
from mmpretrain.evaluators.data.datasets import DataConfig, EvalSet, check_budget
from mmpretrain.evaluators.data.items import Item
from mmpretrain.rng import combine
from mmpretrain.types import Model, Params, Preprocess, Sample, ViewSpec

NO_FEATURES = (
    "this model gives no joint features, and {} needs them: it lacks a tower, or its weights come from a run without a contrastive "
    "objective (no logit_scale), whose projection was never trained. Use knn, linear_probe or finetune"
)
TIMEOUT_S = 300.0  # per batch; a longer one is taken to hang


class Images(NamedTuple):
    """A batch of decoded and cut items. `rows` are indices in the data set; those in `bad` are not in `pixels`."""

    rows: list[int]
    pixels: Tensor  # uint8 [b,3,H,W]
    params: Params
    bad: list[tuple[int, str]]  # (row, reason)


@dataclass
class Features:
    """The model's outputs for each usable item, in order, in float32 on the CPU, on every process."""

    rows: Tensor  # int64 [m], the items, ascending
    values: dict[str, Tensor]  # "features" [m,E], "pooled" [m,D]: those that the model returns
    skipped: list[dict[str, str]]


def cut(item: Item, view: ViewSpec, seed: Tensor, limits: ImageLimits) -> tuple[Tensor, Params]:
    """Read, decode and cut one item; return (uint8 [3, h, w], parameters of the view for one row). Raises BadSample."""
    sample = Sample(key=item.key, image=decode_image(item.read(), limits))
    params = view.draw([sample], seed.reshape(1))
    return view.geometry(sample.image, {name: value[0] for name, value in params.items()}), params


def images(
    dataset: EvalSet, plan: Iterable[list[int]], view: ViewSpec, threads: int, seed: int | Tensor = 0, preprocess: Preprocess | None = None
) -> Iterator[Images]:
    """Yield the images of every batch in `plan`, in order; up to three batches are decoded ahead.

    A row's random numbers depend on (seed, batch number, row) alone. Items that cannot be decoded are listed in `bad`.

    Args:
        dataset: the items.
        plan: rows of each batch.
        view: to cut.
        threads: that read and decode.
        seed: of the view's draws.
        preprocess: the model's, with the background of transparent images where the data set states none.

    Raises:
        HangError: reading or decoding hangs; the message names the items.
    """

    limits = dataset.limits(preprocess)

    def job(number: int, row: int) -> tuple[Tensor, Params] | BadSample:
        try:
            return cut(dataset.items[row], view, combine(seed, number, row), limits)
        except BadSample as error:
            return error

    pool = ThreadPoolExecutor(max_workers=max(threads, 1), thread_name_prefix="evaluate")
    batches = enumerate(plan)
    waiting: deque[tuple[list[int], list[Future]]] = deque()
    try:
        while True:
            for number, rows in islice(batches, 3 - len(waiting)):
                waiting.append((rows, [pool.submit(job, number, row) for row in rows]))
            if not waiting:
                return
            rows, futures = waiting.popleft()
            if wait(futures, TIMEOUT_S).not_done:
                hung = [dataset.items[row].key for row, future in zip(rows, futures, strict=True) if future.running()]
                raise HangError(
                    f"{dataset.name}: no batch of images in {TIMEOUT_S:g} s; being read or decoded are {', '.join(hung[:8])}. "
                    "Is the file system alive? Leave these items out otherwise"
                )
            results = [future.result() for future in futures]
            bad = [(row, str(r)) for row, r in zip(rows, results, strict=True) if isinstance(r, BadSample)]
            good = [(row, r) for row, r in zip(rows, results, strict=True) if not isinstance(r, BadSample)]
            pixels = torch.stack([r[0] for _, r in good]) if good else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
            params = {name: torch.cat([r[1][name] for _, r in good]) for name in good[0][1][1]} if good else {}
            yield Images([row for row, _ in good], pixels, params, bad)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # a thread that hangs is not waited for


def render(view: ViewSpec, batch: Images, device: torch.device) -> Tensor:
    """Render a batch on `device`: [b, 3, H, W], normalised."""
    return view.render(batch.pixels.to(device), {name: value.to(device) for name, value in batch.params.items()}).data


def center_view(model: Model) -> CenterView:
    """Return the view of the model's own evaluation preprocessing."""
    p = model.preprocess
    return CenterView(size=p.size, mean=p.mean, std=p.std, interpolation=p.interpolation, resize_mode=p.resize_mode)


def part(n: int) -> range:
    """Return this process's contiguous part of range(n)."""
    rank, world = distributed.rank(), distributed.world_size()
    return range(n * rank // world, n * (rank + 1) // world)


def gather_rows(local: Tensor) -> Tensor:
    """Gather [m_r, ...] of each process, of any m_r, to [sum m_r, ...] on all: padded for the collective, then cut."""
    if distributed.world_size() == 1:
        return local
    counts = distributed.all_gather_with_grad(torch.tensor([len(local)], device=local.device))
    padded = local.new_zeros(int(counts.max()), *local.shape[1:])
    padded[: len(local)] = local
    gathered = distributed.all_gather_with_grad(padded).unflatten(0, (len(counts), -1))
    return torch.cat([rows[:count] for rows, count in zip(gathered, counts.tolist(), strict=True)])


@torch.no_grad()
def encode_images(model: Model, dataset: EvalSet, accelerator: Accelerator, config: DataConfig) -> Features:
    """Encode every item once.

    Raises:
        BadSampleBudgetError: more than `max_bad_fraction` of the items cannot be used.
        NotFiniteError: an output of the model is not finite.
    """
    stored = _cache_file(model, dataset, config.cache)
    features = _load(stored) if stored is not None and distributed.broadcast_object(stored.is_file()) else None
    if features is None:
        features = _encode(model, dataset, accelerator, config)
        if stored is not None and distributed.is_main():
            _save(features, stored)
        distributed.barrier()
    check_budget(features.skipped, len(dataset), config.max_bad_fraction, dataset.name)
    if not len(features.rows):
        raise BadSampleBudgetError(f"{dataset.name}: none of {len(dataset)} images can be used")
    for name, value in features.values.items():
        check_finite(value, lambda row, name=name: f"{name} of {dataset.items[int(features.rows[row])].key}", model)
    return features


def _encode(model: Model, dataset: EvalSet, accelerator: Accelerator, config: DataConfig) -> Features:
    device, view = accelerator.device, center_view(model)
    mine = part(len(dataset))
    plan = [list(mine[i : i + config.batch_size]) for i in range(0, len(mine), config.batch_size)]
    rows: list[int] = []
    skipped: list[dict[str, str]] = []
    kept: dict[str, list[Tensor]] = {}
    for batch in images(dataset, plan, view, config.threads, config.seed, model.preprocess):
        skipped += [{"key": dataset.items[row].key, "reason": reason} for row, reason in batch.bad]
        if not batch.rows:
            continue
        rows += batch.rows
        encoded = model.images(render(view, batch, device))
        for name in ("features", "pooled"):
            value = getattr(encoded, name)
            if value is not None:
                kept.setdefault(name, []).append(value.float().cpu())
    names, widths = _agreed({name: parts[0].shape[1] for name, parts in kept.items()})
    values = {}
    for name, width in zip(names, widths, strict=True):
        local = torch.cat(kept[name]) if name in kept else torch.empty(0, width)
        values[name] = gather_rows(local.to(device)).cpu()
    order = gather_rows(torch.tensor(rows, dtype=torch.int64, device=device)).cpu()
    return Features(order, values, distributed.gather_lists(skipped))


def check_finite(values: Tensor, what: Callable[[int], str], model: Model) -> None:
    """Raise NotFiniteError for a NaN or infinity in `values` [n, D]; `what(row)` names the first bad input."""
    wrong = torch.nonzero(~values.isfinite().all(1)).flatten()
    if len(wrong):
        raise NotFiniteError(
            f"model {model.fingerprint[:12]} gives values that are not finite for {len(wrong)} of {len(values)} inputs, first the "
            f"{what(int(wrong[0]))}: its weights are damaged, or overflow in precision {getattr(model, 'precision', 'fp32')}"
        )


def _agreed(widths: dict[str, int]) -> tuple[list[str], list[int]]:
    """Return the output names and widths of all processes, also on one without a usable item."""
    merged = dict(sorted(set(distributed.gather_lists(list(widths.items())))))
    return list(merged), list(merged.values())


@torch.no_grad()
def encode_texts(model: Model, texts: list[str], accelerator: Accelerator, batch_size: int) -> Tensor:
    """Encode texts to [n, E], normalised, float32 on the CPU, on every process.

    Raises:
        UnsuitableModelError: the model has no text tower.
        NotFiniteError: an output of the model is not finite.
    """
    mine = part(len(texts))
    parts = []
    for start in range(0, max(len(mine), 1), batch_size):
        chunk = [texts[i] for i in mine[start : start + batch_size]] or texts[:1]  # every process learns the width
        encoded = model.texts(chunk)
        if encoded is None:
            raise UnsuitableModelError("this model has no text tower: use knn, linear_probe or finetune, or give a model with text")
        parts.append(torch.nn.functional.normalize(encoded.float(), dim=-1))
    features = gather_rows(torch.cat(parts)[: len(mine)].to(accelerator.device)).cpu()
    check_finite(features, lambda row: f"features of the text {texts[row]!r:.80}", model)
    return features


def _cache_file(model: Model, dataset: EvalSet, folder: str | None) -> Path | None:
    if folder is None:
        return None
    outputs = sorted(getattr(model, "outputs", ()))  # a model without a trained projection returns no features
    what = (model.fingerprint, dataset.fingerprint(), repr(model.preprocess), getattr(model, "precision", None), outputs)
    return Path(folder) / (hashlib.sha256(repr(what).encode()).hexdigest() + ".safetensors")


def _save(features: Features, path: Path) -> None:
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"rows": features.rows, **{name: value.contiguous() for name, value in features.values.items()}}
    write_atomically(path, save(tensors, metadata={"skipped": json.dumps(features.skipped)}))


def _load(path: Path) -> Features:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        skipped = json.loads(file.metadata()["skipped"])
    return Features(tensors.pop("rows"), tensors, skipped)
