"""Recipes: what is refused, where the message points, and what a continuation may change."""

import pytest

from mmpretrain.assembly import build_model
from mmpretrain.config import recipe as recipes
from mmpretrain.config.build import OptionError
from tests import runs


def recipe(tmp_path, **changes):
    return runs.recipe(tmp_path, tmp_path / "run", **changes)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("checkpoint.keep=0", r"option checkpoint\.keep=0: expected at least 1"),
        ("checkpoint.every=0", "checkpoint.every=0"),
        ("accumulate=0", "accumulate=0"),
        ("log_every=0", "log_every=0"),
        ("loader_threads=0", "loader_threads=0"),
        ("threads=0", "threads=0"),
        ("prefetch=0", "prefetch=0"),
        ("steps=-1", "steps=-1.*at least 0"),
        ("sources.pairs.batch_size=0", r"sources\.pairs\.batch_size=0"),
        ("sources.photos.image.size=0", r"sources\.photos\.image\.size=0"),
        ("optim.clip_grad_norm=0", r"optim\.clip_grad_norm=0\.0: expected more than 0"),
        ("optim.lr=nan", r"optim\.lr=nan"),
        ("objectives.clip.weight=-1", r"objectives\.clip\.weight=-1"),
        ("optim.betas=[1,2]", r"optim\.betas\.0=1\.0.*expected less than 1"),
        ("objectives.simmim.mask_ratio=0", "expected more than 0"),
        ("objectives.simmim.mask_ratio=1", "expected less than 1"),
        ("objectives.masked_text.mask_ratio=2", "expected less than 1"),
        ("objectives.simclr.temperature=0", r"simclr\.temperature=0\.0: expected more than 0"),
        ("teacher.momentum=5", "expected at most 1"),
        ("sources.pairs.image.size=100000", r"image\.size=100000: expected at most 4096"),
        ("sources.pairs.image.background=[300,0,0]", r"background\.0=300.*expected at most 255"),
        ("seed=99999999999999999999999999", "seed=9999.*expected a finite number"),
        ("model=null", r"model=None: expected str \| dict"),
        ("model=[]", "cannot merge model=.*Cannot merge incompatible"),
        ("sources.pairs.shards=null", r"shards=None: expected str \| list"),
        ("sources.pairs.shards={path: 3}", r"expected str \| list"),
        ("steps=???", "expected key=value, found 'steps=\\?\\?\\?'"),
        ("teacher.momentm=1", "unknown option 'teacher.momentm'.*did you mean 'momentum'"),
        ("epochs={source: [1], count: 1}", r"epochs\.source=\[1\]: expected str|epochs\.source=\[1\] .*expected str"),
        ("steps={", "cannot merge steps="),
        ("steps=[1", "cannot merge steps="),
        ("objectives.clip.kind={a: 1}", r"unknown objective {'a': 1}"),
        ("evaluators.z.kind=[1]", r"unknown evaluator \[1\]"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(tmp_path, override, message):
    path = runs.write_recipe(tmp_path / "r.yaml", recipe(tmp_path))
    with pytest.raises(OptionError, match=message):
        recipes.load(path, [override])


@pytest.mark.parametrize("content", [b"5", b"steps: \xff", b"- 1", b"a: [", b"text", b"[" * 5000])
def test_a_file_that_is_no_recipe_is_named(tmp_path, content):
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(OptionError, match=r"r\.yaml"):
        recipes.load(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("image_size=15", r"objectives\.simmim: images of 15 pixels are not a multiple of the tower's patches of 4"),
        ("model.vision_cfg.patch_size=5", "not a multiple of the tower's patches of 5"),
        ("model.vision_cfg.patch_size=17", "patch_size 17 of image_size 16"),
        ("model.vision_cfg.width=0", r"vision_cfg\.width is 0, expected a whole number from 1"),
        ("model.vision_cfg.width=x", r"vision_cfg\.width is 'x'"),
        ("model.vision_cfg.layers=-1", r"vision_cfg\.layers is -1"),
        ("model.vision_cfg.head_width=5", "width 16 is not a multiple of 3 heads"),
        ("model.vision_cfg.head_width=17", "head_width 17 of width 16"),
        ("model.vision_cfg.image_size=100000", "from 1 to 4096"),
        ("model.vision_cfg.mlp_ratio=x", r"vision_cfg\.mlp_ratio.*expected float"),
        ("model.vision_cfg.mlp_ratio=-1", r"vision_cfg\.mlp_ratio is -1, expected 0 or more"),
        ("model.vision_cfg=5", "vision_cfg is 5"),
        ("model.embed_dim=0", "embed_dim \\(1 or more\\)"),
        ("model.text_cfg.vocab_size=10", r"vocab_size is 10, but the tokenizer 'clip' has 49408 ids"),
        ("model.text_cfg.hf_model_name=evil/x", r"hf_model_name is 'evil/x', which is not a folder here"),
        ("model.text_cfg.context_length=1000000000000000", "model: it cannot be built"),
        ("model.vision_cfg.timm_model_name=nope", "model: it cannot be built: Unknown model"),
        ("objectives.simmim.mask_ratio=0.001", "mask_ratio 0.001 hides none of 16 patches"),
        ("model=5", "unknown model '5'"),
        ("sources.pairs.image.size=3", "images of 3 pixels are smaller"),
        ("sources.pairs.image.std=[0,0,0]", r"sources\.pairs: image\.std \[0, 0, 0\]: expected three numbers above 0"),
        ("sources.pairs.image.mean=5", "sources.pairs: image normalisation 5"),
        ("sources.pairs.classes=/nope", r"sources\.pairs: .*No such file.*/nope"),
        ("objectives.clip.augment={scale: [3,1]}", r"objectives\.clip: augment\.scale is \[3\.0, 1\.0\]"),
        ("objectives.clip.augment.hue=2", r"augment\.hue is 2\.0: expected 0 to 0\.5"),
        ("objectives.masked_text.keep=0.95", "together at most 1"),
    ],
)
def test_models_and_views_that_cannot_be_built_are_refused(tmp_path, override, message):
    path = runs.write_recipe(tmp_path / "r.yaml", recipe(tmp_path))
    with pytest.raises(OptionError, match=message):
        build_model(recipes.load(path, [override]))


def test_null_removes_an_objective(tmp_path):
    path = runs.write_recipe(tmp_path / "r.yaml", recipe(tmp_path))
    config = recipes.load(path, ["objectives.simclr=null", "objectives.simmim=null", "sources.photos=null"])
    assert list(config.objectives) == ["clip", "masked_text"]
    assert list(config.sources) == ["pairs"]


def test_the_line_of_the_recipe_is_named(tmp_path):
    path = runs.write_recipe(tmp_path / "r.yaml", recipe(tmp_path, log_every=0))
    line = path.read_text().splitlines().index("log_every: 0") + 1
    with pytest.raises(OptionError, match=rf"log_every=0 \(.*r\.yaml, line {line}\): expected at least 1"):
        recipes.load(path)


def test_null_and_the_smallest_numbers_pass(tmp_path):
    path = runs.write_recipe(tmp_path / "r.yaml", recipe(tmp_path))
    config = recipes.load(path, ["optim.clip_grad_norm=null", "steps=0", "checkpoint.keep=1", "max_skipped_steps=0"])
    assert config.optim.clip_grad_norm is None
    assert config.steps == 0


def test_how_a_source_is_read_may_change_but_not_what(tmp_path):
    old = recipes.plain(recipes.assemble(recipe(tmp_path)))
    free = {"max_bad_fraction": 0.5, "max_consecutive_bad": 7, "cache_dir": "elsewhere", "cache_bytes": 5, "verify": False}
    changed = recipe(tmp_path)
    changed["sources"]["pairs"] |= free
    assert recipes.differences(old, recipes.plain(recipes.assemble(changed))) == []
    changed["sources"]["pairs"]["caption"] = "json:text"
    (line,) = recipes.differences(old, recipes.plain(recipes.assemble(changed)))
    assert line.startswith("sources.pairs.caption")
