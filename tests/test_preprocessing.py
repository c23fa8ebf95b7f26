"""One preprocessing travels with a model: from the sources of its recipe into checkpoint, evaluators and export."""

import io
import json
import logging
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from data_prep.records import Record
from data_prep.shards.serial import write_shards
from mmpretrain import trainer
from mmpretrain.assembly import build_model, frozen_network
from mmpretrain.checkpoint import find_checkpoint
from mmpretrain.config.build import OptionError
from mmpretrain.config.recipe import Config, NetworkConfig, assemble
from mmpretrain.data.decode import ImageLimits, decode_image
from mmpretrain.data.source import ImageConfig, Source, SourceConfig
from mmpretrain.data.views import CenterView
from mmpretrain.evaluators.data.datasets import DataConfig, open_dataset
from mmpretrain.evaluators.features import center_view, images, render
from mmpretrain.evaluators.models import load_model
from mmpretrain.export import export_open_clip, recorded_transparency
from mmpretrain.export import load_model as load_for_export
from tests import runs
from tests.tiny import MODEL


def recipe(images: dict[str, dict], **changes) -> Config:
    sources = {name: {"shards": "x", "image": image} for name, image in images.items()}
    objectives = {f"simclr_{name}": {"kind": "simclr", "source": name} for name in images}
    return assemble({"model": MODEL, "steps": 1, "sources": sources, "objectives": objectives} | changes)


def views(model) -> dict[str, tuple]:
    return {source: {(view.size, view.mean, view.std) for view in specs} for source, specs in model.views().items()}


def test_what_one_source_states_is_the_models_and_every_other_sources():
    model, _ = build_model(recipe({"a": {"mean": "half", "std": [0.25, 0.5, 1], "size": 24}, "b": {}}))
    p = model.towers.preprocess
    assert (p.mean, p.std, p.size) == ((0.5, 0.5, 0.5), (0.25, 0.5, 1.0), 24)
    assert views(model) == {name: {(24, (0.5, 0.5, 0.5), (0.25, 0.5, 1.0))} for name in "ab"}
    same, _ = build_model(recipe({"a": {"mean": "half"}, "b": {"mean": [0.5, 0.5, 0.5]}}))
    assert same.towers.preprocess.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("option", "values"),
    [("mean", ["half", "openai"]), ("std", ["half", "imagenet"]), ("size", [16, 24]), ("background", [[0, 0, 0], "drop"])],
)
def test_sources_that_state_different_values_are_an_error_naming_both(option, values):
    images = {name: {option: value} for name, value in zip("ab", values)}
    with pytest.raises(OptionError, match=rf"sources\.a\.image\.{option} is .* sources\.b\.image\.{option} is .*one preprocessing"):
        build_model(recipe(images))


def transparent_picture(seed: int, size: int = 16) -> Image.Image:
    """Noise under an alpha that is 0 on the left, falls to the right, and is full at the bottom."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 4), dtype=np.uint8)
    pixels[:, :, 3] = np.linspace(0, 255, size).astype(np.uint8)
    pixels[size // 2 :, :, 3] = 255
    return Image.fromarray(pixels, "RGBA")


def encoded(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def train(root: Path, background: object, **changes) -> Path:
    """A run of two steps on pairs of which every second has transparent pixels; -> its checkpoint."""
    records = (
        Record(f"{i:03d}", {"png": encoded(transparent_picture(i)) if i % 2 else runs.picture(i), "txt": b"a dog"}) for i in range(16)
    )
    write_shards(records, root / "pairs", max_count=16)
    image = {"mean": "half", "std": "half", "background": background}
    sources = {"pairs": {"shards": str(root / "pairs"), "batch_size": 8, "image": image}}
    data = runs.recipe(root, root / "run", sources=sources, steps=2, objectives={"clip": {"source": "pairs"}}, teacher=None)
    assert trainer.train(assemble(data | changes)) == 0
    return find_checkpoint(root / "run")


@pytest.mark.parametrize("background", [[255, 255, 255], [10, 200, 30], "random", "drop"])
def test_open_clips_own_preprocess_gives_our_features_of_images_with_alpha(background, tmp_path):
    checkpoint = train(tmp_path, background)
    loaded = load_model(str(checkpoint))
    behind = tuple(background) if isinstance(background, list) else background
    assert (loaded.preprocess.mean, loaded.preprocess.std, loaded.preprocess.background) == ((0.5,) * 3, (0.5,) * 3, behind)
    assert recorded_transparency(checkpoint) == (8, 16)

    export_open_clip(*load_for_export(checkpoint), tmp_path / "out", recorded_transparency(checkpoint))
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "8 of the 16 images seen in training had transparent pixels" in readme
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}/out")
    scope: dict = {}
    exec(readme.split("```python\n")[2].split("```")[0], scope)  # the code that the export tells its users to run

    folder = tmp_path / "pictures" / "noise"
    folder.mkdir(parents=True)
    pictures = [transparent_picture(100 + i) for i in range(4)]
    for i, picture in enumerate(pictures):
        picture.save(folder / f"{i}.png")
    dataset = open_dataset(DataConfig(str(tmp_path / "pictures")), "images")
    [batch] = images(dataset, [[0, 1, 2, 3]], center_view(loaded), 1, preprocess=loaded.preprocess)
    ours = loaded.images(render(center_view(loaded), batch, torch.device("cpu"))).features
    model.eval()
    with torch.no_grad():
        theirs = model.encode_image(torch.stack([preprocess(scope["opaque"](picture)) for picture in pictures]))
        unprepared = model.encode_image(torch.stack([preprocess(picture) for picture in pictures]))
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-3)
    if background != "drop":  # what they would get without the README's lines
        assert (unprepared - ours).abs().max() > 1e-2


def test_background_drop_is_what_pil_converts_to_and_random_is_drawn_from_the_rows_seed(tmp_path):
    picture = transparent_picture(3)
    write_shards((Record(f"{i}", {"png": encoded(picture)}) for i in range(6)), tmp_path / "s", max_count=6)
    view = CenterView(size=16)

    def rows(background, slots=range(6), seed=0):
        config = SourceConfig(shards=str(tmp_path / "s"), image=ImageConfig(background=background))
        return Source("s", config, [view], seed=seed).rows(slots)

    dropped = rows("drop")
    assert torch.equal(dropped.pixels[view][0], torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1))
    assert dropped.transparent == 6
    drawn = rows("random").pixels[view]
    corners = {tuple(image[:, 0, 0].tolist()) for image in drawn}  # alpha is 0 there
    assert len(corners) == 6
    assert torch.equal(rows("random", [4, 1]).pixels[view], drawn[[4, 1]])
    assert not torch.equal(rows("random", seed=1).pixels[view], drawn)
    assert torch.equal(drawn[:, :, 8:], rows([0, 0, 0]).pixels[view][:, :, 8:])  # nothing shows through where alpha is full


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB key"])
def test_drop_is_convert_rgb_in_every_mode_with_transparency(mode):
    image = transparent_picture(5)
    options = {}
    if mode == "RGB key":
        image = image.convert("RGB")
        options = {"transparency": image.getpixel((2, 3))}
    elif mode == "P":
        image = image.convert("RGB").quantize(16)
        options = {"transparency": image.getpixel((2, 3))}
    else:
        image = image.convert(mode)
    out = io.BytesIO()
    image.save(out, "PNG", **options)
    called = []
    found = decode_image(out.getvalue(), ImageLimits(background="drop"), lambda: called.append(1) or "drop")
    assert called == [1]
    with Image.open(io.BytesIO(out.getvalue())) as opened:
        assert torch.equal(found, torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1))
    opaque = io.BytesIO()
    Image.new("RGBA", (16, 16), (1, 2, 3, 255)).save(opaque, "PNG")
    assert decode_image(opaque.getvalue(), background=lambda: called.append(2))[:, 0, 0].tolist() == [1, 2, 3]
    assert called == [1]


def test_a_size_of_the_sources_travels_through_checkpoint_and_export(tmp_path):
    image = {"size": 24, "mean": "half"}
    runs.shards(tmp_path)
    sources = {"pairs": {"shards": str(tmp_path / "pairs"), "batch_size": 8, "image": image}}
    data = runs.recipe(tmp_path, tmp_path / "run", sources=sources, steps=1, objectives={"clip": {"source": "pairs"}}, teacher=None)
    assert trainer.train(assemble(data)) == 0
    loaded = load_model(str(find_checkpoint(tmp_path / "run")))
    assert loaded.preprocess.size == 24
    dual, leftovers = load_for_export(find_checkpoint(tmp_path / "run"))
    export_open_clip(dual, leftovers, tmp_path / "out")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}/out")
    pixels = torch.randn(2, 3, 24, 24)
    assert "24" in str(preprocess)
    torch.testing.assert_close(
        model.eval().encode_image(pixels).detach(), dual.eval().visual(pixels).features.detach(), atol=1e-5, rtol=1e-4
    )
    assert load_model(str(tmp_path / "out")).preprocess == loaded.preprocess


def test_a_checkpoint_from_before_its_size_and_background_were_recorded_loads(tmp_path):
    checkpoint = train(tmp_path, [255, 255, 255])
    file = checkpoint / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["preprocess_cfg"] = {key: config["preprocess_cfg"][key] for key in ("mean", "std", "interpolation", "resize_mode")}
    file.write_text(json.dumps({"model_cfg": config["model_cfg"], "preprocess_cfg": config["preprocess_cfg"]}))
    loaded = load_model(str(checkpoint))
    assert (loaded.preprocess.size, loaded.preprocess.mean, loaded.preprocess.background) == (16, (0.5,) * 3, (255,) * 3)
    assert recorded_transparency(checkpoint) is None


def test_a_frozen_network_keeps_the_preprocessing_of_its_weights_and_init_from_warns_of_another(tmp_path, caplog):
    checkpoint = train(tmp_path, [255, 255, 255])
    frozen = frozen_network(NetworkConfig(model=MODEL, init_from=str(tmp_path / "run")))
    assert (frozen.preprocess.mean, frozen.preprocess.size) == ((0.5,) * 3, 16)
    with caplog.at_level(logging.WARNING):
        build_model(recipe({"a": {}}, init_from=str(checkpoint)))
        assert "was trained with image.mean [0.5, 0.5, 0.5]" in caplog.text
        caplog.clear()
        build_model(recipe({"a": {"mean": "half", "std": "half"}}, init_from=str(checkpoint)))
        assert "was trained with" not in caplog.text
