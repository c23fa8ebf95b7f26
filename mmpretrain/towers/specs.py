"""Construction of towers from a model's name, file or fields: native ones where possible, else adapters."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import open_clip
from open_clip.model import CLIPTextCfg, CLIPVisionCfg

from mmpretrain.config.build import convert, hint
from mmpretrain.data.source_config import MAX_IMAGE_SIZE
from mmpretrain.data.text import tokenizer_name
from mmpretrain.errors import ModelError
from mmpretrain.towers import adapters
from mmpretrain.towers.base import Tower
from mmpretrain.towers.dual import DualEncoder
from mmpretrain.towers.text import TextTransformer
from mmpretrain.towers.vision import VisionTransformer
from mmpretrain.towers.weights import load_weights, recorded_preprocess
from mmpretrain.types import Preprocess

log = logging.getLogger(__name__)

_BOTH = {"width", "layers", "mlp_ratio", "ls_init_value", "pool_type", "act_kwargs", "norm_kwargs"}
_NATIVE = {  # the fields that the native towers support
    "vision_cfg": _BOTH | {"image_size", "patch_size", "head_width", "patch_dropout", "no_ln_pre", "pos_embed_type", "final_ln_after_pool"},
    "text_cfg": _BOTH | {"context_length", "vocab_size", "heads", "pad_id", "eos_id", "no_causal_mask", "proj_bias", "proj_type"},
}
_HARMLESS = {  # fields that do not change the output of the native towers
    "vision_cfg": {"output_tokens", "attn_pooler_queries", "attn_pooler_heads", "timm_model_pretrained"},
    "text_cfg": {"output_tokens", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "final_ln_after_pool", "hf_model_pretrained"},
}


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "vocab.txt", "vocab.json", "sentencepiece.bpe.model")
_COUNTS = {"image_size", "patch_size", "width", "layers", "head_width", "heads", "context_length", "vocab_size"}


def build_towers(
    model: str | dict[str, Any],
    pretrained: str | None = None,
    image_size: int | None = None,
    image: bool = True,
    text: bool = True,
) -> DualEncoder:
    """Build the towers of a model.

    Args:
        model: an open_clip model name, `open_clip:NAME` (its own modules instead of the native ones), a JSON file or
            folder of open_clip's format, its fields as a dict, `timm:NAME` (image tower alone), or `hf:FOLDER` (a
            transformers model with its weights).
        pretrained: a pretrained tag of open_clip (downloaded), or a checkpoint file or folder.
        image_size: pixels per side, instead of the model's own; position embeddings are resized on loading.
        image: build the image tower.
        text: build the text tower.

    Raises:
        ModelError: an unknown model, field or pretrained tag, with the nearest known one.
    """
    preprocess_cfg: dict[str, Any] = {}
    if isinstance(model, str) and model.startswith("hf:"):
        cfg: dict[str, Any] = {"hf_folder": model[3:]}
    else:
        cfg, preprocess_cfg, tokenizer, own_modules = _config(model)
    if folder := cfg.get("hf_folder"):
        visual, words, cfg, preprocess = adapters.from_transformers(folder, image, text)
        preprocess = with_recorded(preprocess, preprocess_cfg)
        preprocess = preprocess if image_size is None else replace(preprocess, size=image_size)
        dual = DualEncoder(visual, words, cfg, preprocess, folder)
        if pretrained is not None:
            load_weights(dual, pretrained)
        return dual
    vision, words_cfg = cfg.get("vision_cfg"), cfg.get("text_cfg")
    if pretrained is not None:  # the checkpoint brings the weights of timm and transformers towers too
        for part, key in ((vision, "timm_model_pretrained"), (words_cfg, "hf_model_pretrained")):
            if part is not None and key.replace("pretrained", "name") in part:
                part[key] = False
    if image_size is not None and vision is not None:
        vision["image_size"] = image_size
    if pretrained is not None:
        preprocess_cfg = preprocess_cfg | recorded_preprocess(pretrained)
    if image_size is not None:
        preprocess_cfg = {key: value for key, value in preprocess_cfg.items() if key != "size"}
    tag = None
    if pretrained is not None and not Path(pretrained).exists():
        tag = _pretrained_tag(model, pretrained)
        preprocess_cfg = {**preprocess_cfg, **{k: v for k, v in tag.items() if k in ("mean", "std", "interpolation", "resize_mode")}}
        if bool(tag.get("quick_gelu")) != bool(cfg.get("quick_gelu")):
            cfg["quick_gelu"] = bool(tag.get("quick_gelu"))
            log.info("pretrained %s was trained with quick_gelu=%s: built so", pretrained, cfg["quick_gelu"])
    visual = _build("vision_cfg", cfg, own_modules) if image and vision is not None else None
    words = _build("text_cfg", cfg, own_modules) if text and words_cfg is not None else None
    if visual is None and words is None:
        raise ModelError(f"model {model!r} gives no tower: image={image}, text={text}, its fields are {sorted(cfg)}")
    dual = DualEncoder(visual, words, cfg, _preprocess(vision, preprocess_cfg), tokenizer)
    if pretrained is not None:
        with download(str(pretrained)):
            file = open_clip.download_pretrained(tag) if tag else pretrained
        load_weights(dual, file)
    return dual


@contextmanager
def download(what: str) -> Iterator[None]:
    """Raises whatever a network makes a library raise as a ModelError that names `what` could not be fetched."""
    try:
        yield
    except Exception as error:  # each network stack has kinds of its own
        raise ModelError(f"{what} cannot be downloaded: {type(error).__name__}: {error}") from error


def _config(model: str | dict[str, Any]) -> tuple[dict, dict, str, bool]:
    """Return (model_cfg, preprocess_cfg, tokenizer, whether to use open_clip's own modules)."""
    if not isinstance(model, str):
        return _local(_checked(copy.deepcopy(dict(model)), "the recipe's model"), "the recipe's model"), {}, _tokenizer(model), False
    if model.startswith("timm:"):
        return adapters.timm_config(model[5:])
    own = model.startswith("open_clip:")
    name = model.removeprefix("open_clip:").removeprefix("local-dir:")
    path = Path(name)
    if path.is_dir() or path.suffix == ".json":
        file = path / "open_clip_config.json" if path.is_dir() else path
        if not file.is_file():
            raise ModelError(f"{file} does not exist: a model folder holds open_clip_config.json")
        try:
            content = json.loads(file.read_text())
        except (ValueError, OSError, RecursionError) as error:
            raise ModelError(f"{file} is not JSON: {error}") from error
        if not isinstance(content, dict) or not isinstance(content.get("model_cfg", content), dict):
            raise ModelError(f"{file}: expected a model's fields (open_clip's format), found {str(content)[:60]!r}")
        cfg = _checked(content.get("model_cfg", content), str(file))
        if not path.is_dir():
            _local(cfg, str(file))
        elif "hf_model_name" in (cfg.get("text_cfg") or {}):
            cfg["text_cfg"]["hf_model_pretrained"] = False  # the folder's own weights follow
        return cfg, content.get("preprocess_cfg", {}), _tokenizer(cfg, folder=path if path.is_dir() else None), own
    cfg = open_clip.get_model_config(name.replace("/", "-") if "hf-hub:" not in name else name)
    if cfg is None:
        near = hint(name, open_clip.list_models(), 3)
        raise ModelError(f"unknown model {model!r}: give an open_clip model name{near}, a JSON file, timm:NAME or hf:FOLDER")
    return _checked(cfg, name), {}, _tokenizer(cfg, name), own


def _checked(cfg: dict, where: str) -> dict:
    """Check every field of an open_clip config, and return the config. Raises ValueError."""
    top = ["embed_dim", "vision_cfg", "text_cfg", "multimodal_cfg", "quick_gelu", "custom_text", "nonscalar_logit_scale", "hf_folder"]
    top += ["init_logit_scale", "init_logit_bias"]
    for key in cfg:
        if key not in top:
            raise ModelError(f"{where}: unknown field {key}{hint(key, top)}")
    known = {"vision_cfg": CLIPVisionCfg, "text_cfg": CLIPTextCfg}
    for part, kind in known.items():
        if not isinstance(cfg.get(part) or {}, dict):
            raise ModelError(f"{where}: {part} is {cfg[part]!r}, expected its fields")
        names, kinds = [field.name for field in fields(kind)], get_type_hints(kind)
        for key, value in (cfg.get(part) or {}).items():
            if key not in names:
                raise ModelError(f"{where}: unknown field {part}.{key}{hint(str(key), names)}")
            if value is None and (key not in _COUNTS or isinstance(cfg[part].get("layers"), list | tuple)):  # a ResNet has no patches
                continue
            if key in _COUNTS:
                sizes = value if isinstance(value, list | tuple) else [value]
                max_size = MAX_IMAGE_SIZE if key == "image_size" else math.inf
                if not all(type(size) is int and 1 <= size <= max_size for size in sizes):
                    limits = f"from 1 to {max_size}" if max_size < math.inf else "from 1 on"
                    raise ModelError(f"{where}: {part}.{key} is {value!r}, expected a whole number {limits}")
            elif isinstance(number := convert(value, kinds[key], f"{part}.{key} of {where}"), int | float) and number < 0:
                raise ModelError(f"{where}: {part}.{key} is {value!r}, expected 0 or more")
    if "hf_folder" in cfg:
        return cfg
    if type(cfg.get("embed_dim")) is not int or cfg["embed_dim"] < 1 or not any(part in cfg for part in known):
        raise ModelError(
            f"{where}: found {sorted(cfg)}, expected embed_dim (1 or more) with vision_cfg, text_cfg or both (open_clip's format)"
        )
    if "multimodal_cfg" in cfg:
        raise ModelError(
            f"{where}: a CoCa model has a caption decoder, which no objective here trains: choose a model without multimodal_cfg"
        )
    return cfg


def _local(cfg: dict, where: str) -> dict:
    """Return the config if it names no repository of the Hugging Face hub, which a recipe must not download. Raises ValueError."""
    for key in ("hf_model_name", "hf_tokenizer_name"):
        name = (cfg.get("text_cfg") or {}).get(key)
        if name is not None and not Path(name).is_dir():
            raise ModelError(f"{where}: text_cfg.{key} is {name!r}, which is not a folder here: download it first, and give the folder")
    return cfg


def _tokenizer(cfg: Any, name: str | None = None, folder: Path | None = None) -> str:
    """The tokenizer's name. An open_clip model's own name, and a folder with a tokenizer's files, say more than the fields."""
    text = cfg.get("text_cfg") or {}
    described = tokenizer_name(text)
    if described == "clip":
        return described
    if folder is not None and text.get("hf_tokenizer_name") and any((folder / file).is_file() for file in _TOKENIZER_FILES):
        return f"local-dir:{folder}"
    return name or described


def _pretrained_tag(model: str | dict, tag: str) -> dict:
    name = model.removeprefix("open_clip:").replace("/", "-") if isinstance(model, str) else ""
    config = open_clip.get_pretrained_cfg(name, tag) if name else None
    if not config:
        tags = open_clip.list_pretrained_tags_by_model(name) if name else []
        raise ModelError(
            f"pretrained {tag!r} is neither a file, a folder nor a tag of {name or 'this model'}: its tags are {tags or 'none'}"
        )
    return config


def _build(part: str, cfg: dict, own_modules: bool) -> Tower:
    given, quick_gelu = cfg[part], cfg.get("quick_gelu", False)
    defaults = {f.name: f.default for f in fields(CLIPVisionCfg if part == "vision_cfg" else CLIPTextCfg)}
    special = {k for k, v in given.items() if k not in _NATIVE[part] | _HARMLESS[part] and v != defaults[k]}
    if isinstance(given.get("layers"), list | tuple):
        special.add("layers")
    if given.get("pool_type") == "none" or isinstance(given.get("patch_size"), list | tuple):
        special.add("pool_type or patch_size")
    special -= {"block_type"} if given.get("block_type") == "default" else set()
    if own_modules or special:
        reason = "as asked" if own_modules else f"for its {', '.join(sorted(special))}"
        log.info("%s: open_clip's own module through the adapter, %s", part, reason)
        return adapters.from_open_clip(part, cfg)
    chosen = {k: v for k, v in given.items() if k in _NATIVE[part]}
    tower = VisionTransformer if part == "vision_cfg" else TextTransformer
    return tower(cfg["embed_dim"], **chosen, quick_gelu=quick_gelu)


def _preprocess(vision: dict | None, cfg: dict) -> Preprocess:
    size = (vision or {}).get("image_size", 224)
    if not isinstance(size, int):
        if size[0] != size[1]:
            raise ModelError(f"image_size {size} is not square: this pipeline trains on square images")
        size = size[0]
    return with_recorded(Preprocess(size), cfg)


def with_recorded(own: Preprocess, cfg: dict) -> Preprocess:
    """A model's preprocessing with what a `preprocess_cfg` states in its place."""
    known = {field.name for field in fields(Preprocess)}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in cfg.items() if k in known and v is not None}
    if not isinstance(given.get("size", 0), int):  # open_clip's may be a pair of sides
        del given["size"]
    return replace(own, **given)
