"""A source (stage 7 of the data pipeline): decoded and cut rows by slot; bad samples are replaced, counted and limited."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmpretrain import rng
from mmpretrain.config.build import OptionError, blaming, build
from mmpretrain.data import buffers, decode
from mmpretrain.data.block import Block
from mmpretrain.data.cache import ShardCache
from mmpretrain.data.fields import Fields, member_of, place_of
from mmpretrain.data.index import LeftOut, Member
from mmpretrain.data.order import Blend, Order
from mmpretrain.data.schema import BadSample, BadSampleBudgetError, ShardError, image_extension, several_images
from mmpretrain.data.shards import ShardSet, load_classes, shard_label
from mmpretrain.data.source_config import ImageConfig, Part, SourceConfig, SplitConfig
from mmpretrain.types import Sample, ViewSpec

log = logging.getLogger(__name__)
__all__ = ["ImageConfig", "Source", "SourceConfig", "SplitConfig"]


class _Tally:
    """Counts of the samples read, and the reasons of bad ones."""

    def __init__(self) -> None:
        self.read = self.bad = 0
        self.reasons: Counter[str] = Counter()
        self.examples: dict[str, str] = {}  # one for each reason

    def add(self, good: int, bad: list[dict[str, Any]]) -> _Tally:
        self.read += good + len(bad)
        self.bad += len(bad)
        for record in bad:
            self.reasons[record["reason"]] += 1
            self.examples.setdefault(record["reason"], "{shard}/{key}: {reason}: {detail}".format_map(record))
        return self


def _by_shard(members: list[tuple[str, LeftOut]]) -> Iterator[tuple[str, list[LeftOut]]]:
    for name, group in itertools.groupby(members, key=lambda pair: pair[0]):
        yield name, [member for _, member in group]


class Source:
    """Named shards that are read in one way: stages 1 to 6 of the data pipeline.

    `schedule` limits views to ranges of slots; a view that it does not name is always made.

    Args:
        name: in the recipe.
        config: its options.
        views: the specs to make. Members that no view needs may be missing.
        labels: read the label too.
        seed: of the run.

    Raises:
        ShardError: a local shard, or the source as a whole, cannot be used.
        OptionError: labels are needed, and the options name no member for them.
    """

    def __init__(self, name: str, config: SourceConfig, views: Collection[ViewSpec], labels: bool = False, seed: int = 0) -> None:
        self.name, self.config, self.seed = name, config, seed
        self.views = sorted(views, key=repr)
        self.schedule: dict[ViewSpec, list[tuple[float, float]]] = {}  # view -> [(first slot, slot after the last)]
        self.batch_size = config.batch_size
        self.classes = load_classes(config.classes)
        self._class_index = None if self.classes is None else {c: i for i, c in enumerate(self.classes)}
        self._labels = bool(labels)
        self._wants = self._needed(self.views)
        if self._wants["label"] and config.label is None:
            raise OptionError(
                f"sources.{name}: an objective needs labels. Name the member that holds them, e.g. `label: cls` or `label: json:category`."
            )
        image = config.image or ImageConfig()
        self._background = image.behind()
        self._limits = decode.ImageLimits(config.max_pixels, config.min_side, config.max_aspect, self._background)
        split = None
        if config.split is not None:
            split = (config.split.holdout, config.split.part)
        cache = ShardCache(config.cache_dir, config.cache_bytes)
        self._base = rng.combine(seed, rng.stream(("source", name)))
        parts = self._parts(config.shards)
        self.shard_sets = [ShardSet(spec, split, config.shuffle_window, cache, config.verify) for spec, _ in parts]
        self._orders = [Order(s.counts, rng.combine(self._base, i), config.shuffle_window) for i, s in enumerate(self.shard_sets)]
        with blaming(f"sources.{name}", ValueError):
            self._blend = Blend([weight for _, weight in parts], self._base)
        self.num_samples = sum(order.total for order in self._orders)
        self._lock = threading.Lock()
        self._tally = _Tally()
        self.reading: dict[int, str] = {}  # thread -> the sample that it reads, for errors
        self._preflight()

    def _needed(self, views: Collection[ViewSpec]) -> dict[str, bool]:
        """Return which members of a sample these views and the labels need."""
        return {modality: any(v.modality == modality for v in views) for modality in ("image", "text")} | {"label": self._labels}

    def views_at(self, slot: int) -> list[ViewSpec]:
        """Return the views of the step that begins at `slot`."""
        return [v for v in self.views if v not in self.schedule or any(a <= slot < b for a, b in self.schedule[v])]

    def _parts(self, shards: Any) -> list[tuple[Any, float]]:
        if not isinstance(shards, (list, tuple)):
            return [(shards, 1.0)]
        if all(isinstance(part, str) for part in shards):
            return [(list(shards), 1.0)]
        where = f"sources.{self.name}.shards"
        parts = [build(Part, {"path": part} if isinstance(part, str) else part, f"{where}.{i}") for i, part in enumerate(shards)]
        return [(part.path, part.weight) for part in parts]

    def _preflight(self) -> None:
        needed = []
        if self._wants["text"]:
            needed.append(member_of(self.config.caption))
        if self._wants["label"]:
            needed.append(member_of(str(self.config.label)))
        for shards, order in zip(self.shard_sets, self._orders):
            where = f"source {self.name!r}, {shards.names[0]}" + (f" and {len(shards.names) - 1} more" if len(shards.names) > 1 else "")
            if order.total == 0:
                part = f" in the {self.config.split.part} part of the split" if self.config.split else ""
                raise ShardError(f"{where}: no samples{part}.")
            n = shards.looked_at
            has = ", ".join(shards.extension_counts)
            if n and self._wants["image"] and image_extension(shards.extension_counts, self.config.image_member) is None:
                what = self.config.image_member or "an image (jpg, png, jpeg, webp)"
                raise ShardError(f"{where}: 0 of {n} samples have {what}; they have {has}.")
            if self._wants["image"] and self.config.image_member is None and (several := several_images(shards.extension_counts, n)):
                log.warning("%s: %s. `image_member:` says which.", where, several)
            for extension in needed:
                if n and not shards.extension_counts.get(extension):
                    raise ShardError(
                        f"{where}: 0 of {n} samples have {extension}; they have {has}. Set `caption:` or `label:` to a member they have."
                    )
            lost = sum(damage.lost for _, damage in shards.damage) + sum(member.lost for _, member in shards.left_out)
            for name, damage in shards.damage:
                log.warning("%s: %s at byte %d: %s; about %d samples lost", name, damage.reason, damage.offset, damage.detail, damage.lost)
            for name, members in _by_shard(shards.left_out):
                some = "; ".join(map(str, members[:3])) + ("; ..." if len(members) > 3 else "")
                count = sum(member.lost for member in members)
                log.warning("%s: %d members cannot be read, %d samples lost: %s", name, len(members), count, some)
            if lost > 10 + self.config.max_bad_fraction * order.total:
                places = [*shards.damage, *shards.left_out]
                name, first = places[0]
                raise ShardError(
                    f"{where}: {len({name for name, _ in places})} damaged shards, about {lost} samples lost; the first is {name}, "
                    f"{first.reason} at byte {first.offset}: {first.detail}. Fetch or build them again, or raise max_bad_fraction "
                    f"({self.config.max_bad_fraction})."
                )

    def damaged(self) -> list[dict[str, Any]]:
        """Return one record per damaged region of the shards and per member that cannot be read, as in skipped.jsonl."""
        return [
            {"source": self.name, "shard": shard_label(name), "key": d.key, "reason": d.reason, "detail": f"byte {d.offset}: {d.detail}"}
            for shards in self.shard_sets
            for name, d in (*shards.damage, *shards.left_out)
        ]

    def read_ahead(self, slot: int) -> None:
        """Start to fetch the remote shards that the slots from `slot` on need."""
        if not any(shards.remote for shards in self.shard_sets):
            return
        component, own = self._blend.locate(np.arange(slot, slot + len(self._blend.cycle)))
        for c, (shards, order) in enumerate(zip(self.shard_sets, self._orders)):
            shards.read_ahead(order.shards_from(int(own[component == c].min())))

    def locate(self, slots: np.ndarray) -> tuple[np.ndarray, ...]:
        """Locate slots, int64 [n]: (component, the component's own slot, shard, sample in the shard, epoch), each int64 [n]."""
        component, own = self._blend.locate(slots)
        shard, sample, epoch = (np.empty_like(own) for _ in range(3))
        for c in np.unique(component).tolist():
            rows = component == c
            shard[rows], sample[rows], epoch[rows] = self._orders[c].locate(own[rows])
        return component, own, shard, sample, epoch

    def rows(self, slots: range | Sequence[int]) -> Block:
        """Decode and cut the samples of these slots.

        Raises:
            BadSampleBudgetError: more samples are bad than the source allows.
            ShardError: a shard cannot be used.
            RuntimeError: a sample cannot be read; the message names it.
        """
        return self.account(self.make(slots))

    def make(self, slots: range | Sequence[int]) -> Block:
        """Do the same as `rows`, but limit only consecutive bad samples: a worker process does not know the total."""
        numbers = np.asarray(slots, np.int64)
        views = self.views_at(int(numbers[0]))
        wants = self._needed(views)
        component, own, *places = self.locate(numbers)
        samples: list[Sample] = []
        origin: list[tuple[int, int, int, int]] = []  # component, epoch, sample of the component, attempt
        skipped: list[dict[str, Any]] = []
        transparent: set[int] = set()  # slots whose image has transparent pixels
        for slot, c, own_slot, *where in zip(*(each.tolist() for each in (numbers, component, own, *places))):
            bad: list[dict[str, Any]] = []  # bad samples of this slot before a good one
            while True:
                place = (c, where[2], int(self._orders[c].first[where[0]]) + where[1], len(bad))

                def background(slot: int = slot, place: tuple[int, int, int, int] = place) -> decode.Background:
                    transparent.add(slot)
                    return self._drawn_background(place)

                try:
                    sample = self._sample(c, where[0], where[1], wants, background)
                    break
                except BadSample as error:
                    transparent.discard(slot)
                    bad.append(self._record(c, where[0], where[1], slot, error))
                    if len(bad) >= self.config.max_consecutive_bad:
                        problem = f"{len(bad)} samples in a row are bad (max_consecutive_bad: {self.config.max_consecutive_bad})"
                        raise self._over_budget(problem, _Tally().add(0, bad), skipped + bad) from error
                    where = self._orders[c].replacement(own_slot, len(bad))
            skipped += [record | {"replaced_by": sample.key} for record in bad]
            samples.append(sample)
            origin.append(place)
        block = self._cut(samples, rng.combine(self._base, *torch.tensor(origin).unbind(1)), skipped, views)
        return block._replace(transparent=len(transparent))

    def _drawn_background(self, place: tuple[int, int, int, int]) -> decode.Background:
        """What an image with transparent pixels is laid over; a random colour comes from the seed of its row alone.

        Args:
            place: component, epoch, sample of the component, attempt.
        """
        if self._background != "random":
            return self._background
        return tuple(rng.integers(rng.combine(self._base, *place).reshape(1), "background", 256, 3)[0].tolist())

    def account(self, block: Block) -> Block:
        """Count the samples of a block from `make`. Raises BadSampleBudgetError where too many of all were bad."""
        with self._lock:
            self._tally.add(len(block.keys), block.skipped)
            if self._tally.bad > 10 + self.config.max_bad_fraction * self._tally.read:
                problem = f"{self._tally.bad} of {self._tally.read} samples read are bad"
                raise self._over_budget(
                    f"{problem}, more than max_bad_fraction: {self.config.max_bad_fraction}", self._tally, block.skipped
                )
        return block

    def read(self, component: int, shard: int, sample: int) -> tuple[str, str, dict[str, bytes]]:
        """Read all members of a sample, located by `locate`; return (shard name, key, extension -> bytes).

        Raises:
            BadSample: a member cannot be read; the message names shard and key.
            ShardError: the shard cannot be used.
        """
        shards = self.shard_sets[component]
        key, members, opened = shards.members(shard, sample)
        try:
            return shards.names[shard], key, {extension: shards.read(opened, member) for extension, member in members.items()}
        except BadSample as error:
            raise BadSample(error.reason, f"{shards.names[shard]}, {key}: {error.detail}") from error

    def _record(self, c: int, shard: int, number: int, slot: int, bad: BadSample) -> dict[str, Any]:
        name = self.shard_sets[c].names[shard]
        key = self.shard_sets[c].members(shard, number)[0]
        return {"source": self.name, "shard": shard_label(name), "key": key, "reason": bad.reason, "detail": bad.detail, "slot": slot}

    def _over_budget(self, problem: str, tally: _Tally, records: list[dict[str, Any]]) -> BadSampleBudgetError:
        reasons = ", ".join(f"{n} {reason}" for reason, n in tally.reasons.most_common())
        return BadSampleBudgetError(
            f"source {self.name!r}: {problem}: {reasons}. "
            f"For instance {'; '.join(list(tally.examples.values())[:3])}. Repair the shards or raise the limit.",
            records,
        )

    def _sample(self, c: int, shard: int, number: int, wants: dict[str, bool], background: Callable[[], decode.Background]) -> Sample:
        name = shard_label(self.shard_sets[c].names[shard])
        me = threading.get_ident()
        self.reading[me] = name
        key = f"{name}/#{number}"
        try:
            key, members, opened = self.shard_sets[c].members(shard, number)
            key = self.reading[me] = f"{name}/{key}"
            return self._decode(key, members, lambda member: self.shard_sets[c].read(opened, member), wants, background)
        except (BadSample, ShardError):
            raise
        except Exception as error:
            raise RuntimeError(
                f"source {self.name!r}: reading {key} of {self.shard_sets[c].names[shard]}: {type(error).__name__}: {error}"
            ) from error
        finally:
            self.reading.pop(me, None)

    def _decode(
        self,
        key: str,
        members: dict[str, Member],
        read: Callable[[Member], bytes],
        wants: dict[str, bool],
        background: Callable[[], decode.Background],
    ) -> Sample:
        sample = Sample(key)
        limit = self.config.max_member_bytes
        fields = Fields.placed(members, read, limit)
        if wants["text"]:  # before the image: captions are cheaper to refuse
            sample.captions = fields.captions(self.config.caption)
        if self._wants["label"]:
            sample.labels["label"] = fields.label(str(self.config.label), self._class_index)
        if wants["image"]:
            data = read(place_of(members, image_extension(members, self.config.image_member), limit))
            sample.image = decode.decode_image(data, self._limits, background)
        return sample

    def _cut(self, samples: list[Sample], seeds: Tensor, skipped: list[dict[str, Any]], views: list[ViewSpec]) -> Block:
        pixels, params = {}, {}
        for spec in views:
            drawn = params[spec] = spec.draw(samples, seeds)
            each = zip(*(value.unbind(0) for value in drawn.values())) if drawn else ((),) * len(samples)
            sources = [sample.image if spec.modality == "image" else sample.captions for sample in samples]
            cut = (spec.geometry(source, dict(zip(drawn, values))) for source, values in zip(sources, each))
            pixels[spec] = buffers.stack(cut, len(samples))
        labels = {"label": torch.tensor([s.labels["label"] for s in samples])} if self._wants["label"] else {}
        return Block([s.key for s in samples], seeds, labels, pixels, params, skipped, {})
