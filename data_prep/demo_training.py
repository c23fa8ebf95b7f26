"""The demo's data under a training run: the training splits are awaited before the first step, the others when an evaluator reads them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.demo_background import Writing, lock_path
from data_prep.demo_scenes import SPLITS
from mmpretrain.system import hold

if TYPE_CHECKING:
    from mmpretrain.config.recipe import Config

TRAINING = ("pairs", "photos")
EVALUATION = tuple(split for split in SPLITS if split not in TRAINING)


class DemoData:
    """The demo shards in `root`, written where they are missing."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self._training = Writing(self.root, TRAINING)
        self._evaluation: Writing | None = None

    def prepare(self, config: Config) -> None:
        """Wait for what `config` trains on, and have the rest written behind the training. Raises DemoError."""
        from mmpretrain import evaluation

        self._training.wait()
        self._evaluation = later = Writing(self.root, EVALUATION, quiet=True)
        if any(str(self.root / split) in repr(source.shards) for split in EVALUATION for source in config.sources.values()):
            later.wait()
        evaluation.PENDING |= {(self.root / split).absolute(): later.wait for split in EVALUATION}
        test = config.evaluators.get("test")
        if test is not None and Path(str(getattr(test.options, "data", ""))) == self.root / "test":
            evaluation.BASELINES["test"] = self._baselines

    def _baselines(self) -> dict[str, float]:
        from data_prep.demo_baselines import nearest_neighbour_baselines

        with hold(lock_path(self.root)):
            found = nearest_neighbour_baselines(self.root)
        return {name: found[name] for name in ("colour_histogram_knn", "raw_pixel_knn")}

    def stop(self) -> None:
        for writing in (self._training, self._evaluation):
            if writing is not None:
                writing.stop()
