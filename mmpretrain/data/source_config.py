"""The options of a source in a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import Annotated, Any, Literal

from mmpretrain.config.build import OptionError, Range
from mmpretrain.data.views import NORMALISATION

MAX_IMAGE_SIZE = 4096  # pixels per side of a tower's input


@dataclass
class ImageConfig:
    """Size, normalisation and background of a source's images."""

    size: Annotated[int | None, Range(1, MAX_IMAGE_SIZE)] = None  # pixels a side of the views; default: the model's
    mean: Any = None  # openai, imagenet, half, or three numbers; default: the model's
    std: Any = None  # openai, imagenet, half, or three numbers; default: the model's
    background: Annotated[list[int] | Literal["random", "drop"], Range(0, 255)] = field(
        default_factory=lambda: [255, 255, 255]
    )  # RGB that shows through transparency; random: a colour of each row's own; drop: what lies under it, as PIL's convert("RGB") does

    def behind(self) -> tuple[int, ...] | str:
        """`background` as Preprocess has it. Raises ValueError for a list that is not three numbers."""
        if isinstance(self.background, list) and len(self.background) != 3:
            raise ValueError(f"image.background {self.background}: expected three numbers, random or drop")
        return tuple(self.background) if isinstance(self.background, list) else self.background

    def normalisation(self, mean: Any = "openai", std: Any = "openai") -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Return (mean, std) as numbers; the arguments are the defaults. Raises ValueError for an unknown name or other numbers."""
        numbers = []
        for value, which in ((self.mean or mean, 0), (self.std or std, 1)):
            if isinstance(value, str):
                if value not in NORMALISATION:
                    raise ValueError(f"image normalisation {value!r}: expected {', '.join(NORMALISATION)} or three numbers")
                value = NORMALISATION[value][which]
            if not isinstance(value, list | tuple) or len(value) != 3 or not all(isinstance(v, int | float) and isfinite(v) for v in value):
                raise ValueError(f"image normalisation {value!r}: expected three numbers")
            if which == 1 and min(value) <= 0:
                raise ValueError(f"image.std {list(value)}: expected three numbers above 0")
            numbers.append(tuple(float(v) for v in value))
        return numbers[0], numbers[1]


@dataclass
class SplitConfig:
    """A division of samples in two, the same for a source and an evaluator of the same share."""

    holdout: float = 0.1  # share of the samples held out, by the hash of their keys
    part: str = "train"  # train or holdout: which part is read

    def __post_init__(self) -> None:
        if not 0 < self.holdout < 1 or self.part not in ("train", "holdout"):
            raise OptionError(f"holdout {self.holdout:g}, part {self.part!r}: expected a share between 0 and 1, and train or holdout")


@dataclass
class Part:
    """A weighted part of a source's shards."""

    path: str | list[str]  # shards, in any other form
    weight: float = 1.0  # how often these are read, relative to the other parts


@dataclass
class SourceConfig:
    """Options of a source: shards that are read in one way."""

    shards: str | list = ""  # glob, brace range, folder, several joined with ::, a list of these, or a list of {path, weight}
    batch_size: Annotated[int, Range(1)] = 256  # global rows per update
    image: ImageConfig | None = field(default_factory=ImageConfig)  # how images are made into views
    image_member: str | None = None  # the member that is the image (png, input.jpg); default: the first of jpg, png, ... that a sample has
    caption: str = "txt"  # the member that holds the caption, or json:FIELD (a text or a list of texts)
    label: str | None = None  # the member that holds the class (cls), or json:FIELD
    classes: Any = None  # class names, or a file with one per line: needed where labels are names
    split: SplitConfig | None = None  # hold samples out, by the hash of their keys
    shuffle_window: Annotated[int, Range(1)] = 16  # shards whose samples are mixed
    max_bad_fraction: Annotated[float, Range(0)] = 0.01  # bad samples among those read before the run stops; ten more are always allowed
    max_consecutive_bad: Annotated[int, Range(1)] = 100  # bad samples in a row, replacements included, before the run stops
    max_pixels: Annotated[int, Range(1)] = 64_000_000  # larger images are bad samples, as stated by their headers
    min_side: Annotated[int, Range(1)] = 8  # pixels; smaller images are bad samples
    max_aspect: Annotated[float, Range(1)] = 20.0  # longer side over shorter side; more elongated images are bad samples
    max_member_bytes: Annotated[int, Range(1)] = 64 << 20  # larger members are bad samples; a caption may have 64 KiB
    verify: bool = True  # compare members with the checksums of the index, where it has them
    cache_dir: str | None = None  # copies of remote shards; default: the user's cache folder
    cache_bytes: Annotated[int, Range(0)] = 100 << 30  # limit of these copies
