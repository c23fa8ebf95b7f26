"""The shared types: samples, views, encodes, results. B rows, N patch or word tokens, D width, E joint embedding, L text length."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import ItemsView, Sequence, ValuesView
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, NamedTuple, Protocol, TypeGuard, TypeVar, runtime_checkable

from torch import Tensor, nn

Part = TypeVar("Part", bound=nn.Module)
Params = dict[str, Tensor]  # a view's random draws, one row per sample: name -> [B, ...]


@dataclass
class Sample:
    """One decoded sample: the members that a source needs."""

    key: str  # "shard/key"
    image: Tensor | None = None  # uint8 [3, H, W], full resolution
    captions: list[str] | None = None
    labels: dict[str, int] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


class View(NamedTuple):
    """One rendering of B samples."""

    data: Tensor  # image [B,3,H,W] normalised; text int64 [B,L], where -1 stands for the mask embedding
    target: Tensor | None = None  # documented by the spec: a label [B], or text [B,L] with -100 ignored


class Rows(NamedTuple):
    """One source's part of a batch."""

    keys: list[str]  # "shard/key", for messages
    seeds: Tensor  # int64 [B]: counter seed of (run seed, epoch, sample)
    labels: dict[str, Tensor]  # name -> int64 [B]
    views: dict[ViewSpec, View]


Batch = dict[str, Rows]  # source name -> rows


@dataclass(frozen=True)
class ViewSpec(ABC):
    """A view of a sample: random numbers are drawn for all rows, geometry is applied per row, and the batch is rendered at once.

    Equal specs are one view. `stream` names the random numbers, so specs that differ in any field draw differently.
    """

    modality: ClassVar[Literal["image", "text"]]
    masks_words: ClassVar[bool] = False  # text: `data` holds -1 where the tower's mask embedding goes
    index: int = 0

    @property
    def stream(self) -> object:
        """Name of the random stream. Specs with the same name draw the same numbers, such as the tiles of one puzzle."""
        return repr(self)

    @abstractmethod
    def draw(self, samples: Sequence[Sample], seeds: Tensor) -> Params:
        """Draw the random numbers of every row from `seeds` (int64 [B]) alone; each value has B rows."""

    @abstractmethod
    def geometry(self, source: Any, params: Params) -> Tensor:
        """Cut one row: image uint8 [3,H,W] -> uint8 [3,h,w]; captions list[str] -> int64 [L]. `params` holds that row."""

    @abstractmethod
    def render(self, pixels: Tensor, params: Params) -> View:
        """Render the whole batch on any device: photometric operations and normalisation, or corruption of text."""


class ImageSpec(Protocol):
    """The attributes of every view of modality image."""

    @property
    def size(self) -> int:
        """Pixels a side."""
        ...

    @property
    def mean(self) -> tuple[float, float, float]: ...

    @property
    def std(self) -> tuple[float, float, float]: ...


class TextSpec(Protocol):
    """The attributes of every view of modality text."""

    @property
    def tokenizer(self) -> str:
        """Name of the tokenizer, for `get_tokenizer`."""
        ...

    @property
    def context_length(self) -> int:
        """Tokens of a caption, padding included."""
        ...


def is_image(view: ViewSpec) -> TypeGuard[ImageSpec]:
    """Return whether a view is of modality image, and thus has the attributes of an ImageSpec."""
    return view.modality == "image"


def is_text(view: ViewSpec) -> TypeGuard[TextSpec]:
    """Return whether a view is of modality text, and thus has the attributes of a TextSpec."""
    return view.modality == "text"


@dataclass(frozen=True)
class MaskSpec:
    """The tokens that an encode hides: exactly round(ratio * N) in every row.

    `replace` substitutes the tower's mask embedding (SimMIM, BEiT); `drop` removes them (MAE, FLIP). `from_` names the
    encode whose class-token attention determines which tokens are hidden first (attentive masking).
    """

    ratio: float
    mode: Literal["replace", "drop"] = "replace"
    kind: Literal["random", "block", "attentive"] = "random"
    patch: int = 1  # tokens are hidden in squares of this many patches a side
    from_: Encode | None = None
    index: int = 0


@dataclass(frozen=True)
class MixSpec:
    """Mixing of pictures with a partner row: row i of the global batch with row i ^ 1, with the same share for both.

    Mixup blends the two (Zhang 2018); CutMix pastes a rectangle of the partner (Yun 2019). With both, each pair gets
    one of them with probability 1/2 (DeiT, Touvron 2021).
    """

    mixup: float = 0.0  # alpha of Beta(alpha, alpha), in (0, 1]; 0: none
    cutmix: float = 0.0
    index: int = 0


@dataclass(frozen=True)
class Encode:
    """A forward pass of a tower that an objective requests."""

    source: str
    view: ViewSpec
    mask: MaskSpec | None = None
    network: str = "student"  # "teacher": the EMA copy, without gradient; or a frozen one of the recipe's `networks`
    mix: MixSpec | None = None  # mixup and CutMix, drawn from the rows' seeds: ranks and chunks do not matter
    outputs: frozenset[str] = frozenset({"features"})  # requested fields of Encoded, which are computed and cached
    bidirectional: bool = False  # text: no causal mask, key padding instead


class Encoded(NamedTuple):
    """Outputs of a tower for one view."""

    features: Tensor | None = None  # [B,E] projected to the joint space, not normalised
    pooled: Tensor | None = None  # [B,D] before that projection
    tokens: Tensor | None = None  # [B,N,D] patch or word tokens only; when dropped, the visible ones in raster order
    attention: Tensor | None = None  # [B,N] class-token attention of the last block
    mask: Tensor | None = None  # bool [B,N], True = hidden
    grid: tuple[int, int] | None = None  # patches down, across
    rows: Rows | None = None  # the source's labels, keys and views
    view: View | None = None  # the view that was encoded
    mix: Tensor | None = None  # float32 [B], the share of a row's own picture; the rest is its partner's, row i ^ 1


class Requested(Encoded):
    """The outputs of one encode for an objective: the requested ones, rows and view are never None.

    `PretrainModel.arguments` makes it; reading an output that was not requested raises ModelError.
    """

    __slots__ = ()
    if TYPE_CHECKING:
        features: Tensor
        pooled: Tensor
        tokens: Tensor
        attention: Tensor
        rows: Rows
        view: View


OUTPUTS = frozenset({"features", "pooled", "tokens", "attention"})  # the fields of Encoded that a tower computes


@dataclass
class Result:
    """The result of an evaluator. Metrics are fractions in 0..1, named as in CLIP_benchmark where it has a name."""

    metrics: dict[str, float]
    n: int  # samples evaluated
    dataset: str = ""
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # name -> rows, for the report
    figures: dict[str, Any] = field(default_factory=dict)  # name -> matplotlib Figure
    baselines: dict[str, float] = field(default_factory=dict)  # name -> acc1 on the same data without a model


@dataclass(frozen=True)
class Preprocess:
    """Preprocessing of images at evaluation: resize the shorter side, crop the centre, normalise."""

    size: int
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"  # or "squash"
    background: tuple[int, ...] | str = (255, 255, 255)  # RGB behind transparency; "random": of each image its own; "drop": none

    def opaque(self) -> tuple[int, ...] | str:
        """What evaluation lays images with transparency over: white where training drew the colours."""
        return (255, 255, 255) if self.background == "random" else self.background

    def recorded(self) -> dict[str, Any]:
        """As checkpoints and exports hold it: open_clip's `preprocess_cfg`."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}


@runtime_checkable
class Model(Protocol):
    """All that an evaluator may use of a model: a run, an open_clip folder, a timm or transformers tower."""

    @property
    def fingerprint(self) -> str:
        """Identifier of the weights, for caching."""
        ...

    @property
    def preprocess(self) -> Preprocess:
        """Preprocessing for `images`."""
        ...

    def images(self, pixels: Tensor) -> Encoded:
        """Encode normalised images [B, 3, H, W] on the model's device: features, pooled, tokens. No gradient."""
        ...

    def texts(self, texts: list[str]) -> Tensor | None:
        """Encode texts to [n, E], not normalised; None for an image-only model. No gradient."""
        ...

    def copy(self, random: bool = False) -> nn.Module:
        """Copy the image tower for fine-tuning; with `random`, its weights are drawn as at the start of training."""
        ...


class TypedModuleDict(nn.ModuleDict, Generic[Part]):
    """torch's ModuleDict with the type of its modules."""

    if TYPE_CHECKING:

        def __getitem__(self, key: str) -> Part: ...

        def values(self) -> ValuesView[Part]: ...

        def items(self) -> ItemsView[str, Part]: ...
