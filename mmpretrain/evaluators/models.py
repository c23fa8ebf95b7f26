"""Models behind the interface of evaluators: runs, open_clip folders and names, timm and transformers towers."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from mmpretrain.data.text import get_tokenizer, trim
from mmpretrain.errors import ModelError, UnsuitableModelError
from mmpretrain.evaluators.base import OptionError
from mmpretrain.towers.adapters import TimmTower
from mmpretrain.towers.dual import DualEncoder
from mmpretrain.towers.specs import build_towers, download
from mmpretrain.towers.weights import load_weights, read_weights
from mmpretrain.types import Encoded, Model

Precision = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_CONFIG = "open_clip_config.json"


def autocast(model: Model, device: torch.device | str) -> torch.autocast:
    """Return the autocast context of the model's precision; disabled for a model without that attribute."""
    dtype = _DTYPES[getattr(model, "precision", "fp32")]
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None)


class TowerModel:
    """A DualEncoder as a Model. It may wrap live towers during training: their modes are restored after each call."""

    def __init__(
        self,
        dual: DualEncoder,
        device: torch.device | str | None = None,
        precision: Precision = "fp32",
        new_tower: Callable[[], nn.Module | None] | None = None,
        joint: bool = True,
    ) -> None:
        """Wrap towers.

        Args:
            dual: the towers.
            device: to move them to.
            precision: of their computation.
            new_tower: makes an image tower with new weights; default: from `dual.model_cfg`.
            joint: False where the projection was never trained, so that no features are returned.
        """
        if precision not in _DTYPES:
            raise OptionError(f"precision {precision!r}: expected {', '.join(_DTYPES)}")
        self.dual = dual if device is None else dual.to(device)
        self.precision = precision
        self.preprocess = dual.preprocess
        self.outputs = frozenset({"pooled", "features"} if joint else {"pooled"})
        self._new_tower = new_tower or (lambda: build_towers(dual.model_cfg, text=False).visual)

    @property
    def fingerprint(self) -> str:
        """sha256 of names, types, shapes and values of the weights. Computed once: wrap live towers again after they change."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, value in sorted(self.dual.weights().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        modes = [module for module in self.dual.modules() if module.training]
        self.dual.eval()
        try:
            with torch.inference_mode(), autocast(self, next(self.dual.parameters()).device):
                yield
        finally:
            for module in modes:
                module.training = True

    def images(self, pixels: Tensor) -> Encoded:
        """Encode normalised images [B, 3, H, W]: features [B, E], pooled [B, D], and tokens [B, N, D] of a patch tower."""
        tower = self.dual.visual
        if tower is None:
            raise UnsuitableModelError("this model has no image tower")
        outputs = self.outputs | ({"tokens"} if tower.patch_size is not None else set())
        with self._evaluating():
            return tower(pixels, outputs=outputs)

    def texts(self, texts: list[str]) -> Tensor | None:
        """Encode texts to [n, E]; None without a text tower."""
        tower = self.dual.text
        if tower is None:
            return None
        tokenizer = get_tokenizer(self.dual.tokenizer)
        ids = tokenizer.encode(texts, self.dual.context_length)
        if tower.trimmable:
            ids = trim(ids, tokenizer.eot)
        with self._evaluating():
            return tower(ids.to(next(tower.parameters()).device), outputs=frozenset({"features"})).features

    def copy(self, random: bool = False) -> nn.Module:
        """Copy the image tower for fine-tuning, all parameters trainable; with `random`, its weights are drawn from torch's generator."""
        if self.dual.visual is None:
            raise UnsuitableModelError("this model has no image tower to fine-tune")
        device = next(self.dual.visual.parameters()).device
        tower = self._new_tower() if random else copy.deepcopy(self.dual.visual)
        assert tower is not None  # `model_cfg` has vision_cfg while there is an image tower
        return tower.to(device).requires_grad_(True)


class Untrained:
    """A model's image tower with new weights, as a Model: the result of a probe without any pretraining."""

    def __init__(self, model: Model, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.tower = model.copy(random=True).eval()
        self.preprocess = model.preprocess
        self.precision = getattr(model, "precision", "fp32")
        self.fingerprint = f"{model.fingerprint} with random weights of seed {seed}"

    def images(self, pixels: Tensor) -> Encoded:
        """Encode normalised images [B, 3, H, W]."""
        with torch.inference_mode(), autocast(self, pixels.device):
            return self.tower(pixels, outputs=frozenset({"pooled", "features"}))

    def texts(self, texts: list[str]) -> Tensor | None:
        """Return None: there is no text tower."""
        return None

    def copy(self, random: bool = False) -> nn.Module:
        """Copy the image tower for fine-tuning."""
        return copy.deepcopy(self.tower).requires_grad_(True)


def load_model(
    spec: str,
    device: torch.device | str = "cpu",
    *,
    weights: Literal["student", "teacher"] = "student",
    arch: str | None = None,
    precision: Precision = "fp32",
    find_checkpoint: Callable[[Path], Path] | None = None,
) -> TowerModel:
    """Load a model by its spec.

    - a run folder, with `find_checkpoint`: its newest valid checkpoint; - a checkpoint or open_clip folder: weights
    and open_clip_config.json. One without a logit_scale comes from a run without a
      contrastive objective: its projection was never trained, so `features` are not returned;
    - a .pt or .safetensors file, with `arch`; - `ViT-B-32:laion2b_s34b_b79k`: an open_clip name and pretrained tag,
    downloaded; - `timm:NAME` (pretrained weights, downloaded), or `hf:FOLDER` (a transformers model).

    Args:
        spec: one of these.
        device: of the model.
        weights: "teacher" uses teacher.safetensors.
        arch: an open_clip model name or JSON file.
        precision: of its computation.
        find_checkpoint: finds the checkpoint of a run; see mmpretrain.checkpoint.find_checkpoint.

    Raises:
        OptionError: the spec names no model.
        ModelError: the weights cannot be read or do not fit.
    """
    path = Path(spec)
    if path.is_dir():
        if (path / "checkpoints").is_dir() or (not (path / _CONFIG).is_file() and any(path.glob("step-*"))):
            if find_checkpoint is None:
                raise OptionError(f"{path} is a run; give one of its checkpoints: {path}/checkpoints/step-N")
            path = find_checkpoint(path)
        elif (path / "manifest.json").is_file() and find_checkpoint is not None:
            path = find_checkpoint(path)  # a checkpoint of ours named directly is verified too
        dual, joint = _from_folder(path, weights)
        return TowerModel(dual, device, precision, joint=joint)
    elif weights == "teacher":
        raise OptionError(f"{spec}: a teacher is kept only in the checkpoints of a run, and this is not a folder")
    elif path.is_file():
        if arch is None:
            raise OptionError(f"{spec} holds weights only: name their architecture, an open_clip model such as ViT-B-32")
        with _bad_argument():
            dual = build_towers(arch)
        load_weights(dual, spec)
    elif spec.startswith("timm:"):
        return TowerModel(_pretrained_timm(spec), device, precision, joint=False)
    elif spec.startswith("hf:"):
        if not Path(spec[3:]).is_dir():
            raise OptionError(f"{spec}: no such folder {spec[3:]!r}")
        dual = build_towers(spec)
        return TowerModel(dual, device, precision, lambda: _new_transformers_tower(spec[3:]))
    elif ":" in spec and "/" not in spec.split(":")[0]:
        name, tag = spec.rsplit(":", 1)
        with _bad_argument():
            dual = build_towers(name, pretrained=tag)
    else:
        raise OptionError(
            f"model {spec!r}: no such folder or file; expected a run, a checkpoint or open_clip folder, a weights file with an "
            "architecture, NAME:PRETRAINED_TAG of open_clip, timm:NAME, or hf:FOLDER"
        )
    return TowerModel(dual, device, precision)


@contextlib.contextmanager
def _bad_argument() -> Iterator[None]:
    """Turn a ModelError for an unknown model name or tag into an OptionError, the caller's mistake."""
    try:
        yield
    except ModelError as error:
        raise OptionError(str(error)) from error


def _from_folder(folder: Path, weights: str) -> tuple[DualEncoder, bool]:
    """Load the towers of a folder; return them, and whether their projections were trained to a joint space."""
    teacher = folder / "teacher.safetensors"
    if weights == "teacher" and not teacher.is_file():
        raise OptionError(f"{folder}: no teacher.safetensors, so this run kept no teacher; leave out weights=teacher")
    if not (folder / _CONFIG).is_file():
        names = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "nothing"
        raise OptionError(f"{folder}: expected {_CONFIG} beside model.safetensors or open_clip_model.safetensors, found {names}")
    names = read_weights(folder).keys()
    towers = {name.split(".")[0] for name in names}
    dual = build_towers(str(folder), image="visual" in towers, text="text" in towers)
    load_weights(dual, teacher if weights == "teacher" else folder)
    return dual, "logit_scale" in names


def _pretrained_timm(spec: str) -> DualEncoder:
    import timm

    with _bad_argument():
        dual = build_towers(spec)
    assert isinstance(dual.visual, TimmTower)
    trunk = dual.visual.module.trunk
    with download(spec):
        pretrained = timm.create_model(spec.removeprefix("timm:"), pretrained=True, num_classes=0)
    trunk.load_state_dict(pretrained.state_dict())
    return dual


def _new_transformers_tower(folder: str) -> nn.Module:
    """Build the image tower of a transformers folder with the initial weights of its library."""
    from transformers import AutoConfig, AutoModel

    from mmpretrain.towers.huggingface import from_transformers, rule_of

    tower = from_transformers(folder, image=True, text=False)[0]
    if tower is None:
        raise UnsuitableModelError(f"hf:{folder} has no image tower to fine-tune")
    fresh = AutoModel.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    rule = rule_of(folder)
    tower.model.load_state_dict((fresh if rule is None else getattr(fresh, rule.image)).state_dict())
    if rule is not None and rule.image_projection is not None:
        tower.projection.load_state_dict(getattr(fresh, rule.image_projection).state_dict())
    return tower
