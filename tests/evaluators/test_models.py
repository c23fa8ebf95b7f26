import json

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from mmpretrain import checkpoint
from mmpretrain.evaluators import build_evaluator
from mmpretrain.evaluators import finetune as evaluator_module
from mmpretrain.evaluators.base import OptionError
from mmpretrain.evaluators.models import TowerModel, load_model
from mmpretrain.types import Model
from tests.evaluators.fake import colour_folder, picture, write
from tests.tiny import MODEL, towers

CONFIG = {"model_cfg": MODEL, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}}
STATE = {"step": 1, "positions": {}, "skipped_steps": 0}


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    root = tmp_path_factory.mktemp("coloured")
    colour_folder(root / "train", ["red", "green", "blue"], 8)
    colour_folder(root / "test", ["red", "green", "blue"], 3)
    return root


def open_clip_folder(path, dual):
    path.mkdir(parents=True)
    save_file(dual.state_dict() | {"logit_scale": torch.tensor(1.0)}, path / "open_clip_model.safetensors")
    (path / "open_clip_config.json").write_text(json.dumps(CONFIG))
    return path


def test_a_folder_gives_the_same_model(tmp_path):
    dual = towers()
    model = load_model(str(open_clip_folder(tmp_path / "m", dual)))
    assert isinstance(model, Model)
    assert model.fingerprint == TowerModel(dual).fingerprint
    assert (model.preprocess.size, model.preprocess.mean, model.preprocess.resize_mode) == (16, (0.5, 0.5, 0.5), "squash")
    pixels = torch.randn(2, 3, 16, 16)
    found, expected = model.images(pixels), dual.eval().visual(pixels, outputs=frozenset({"features", "pooled", "tokens"}))
    for name in ("features", "pooled", "tokens"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name).detach())
    assert model.texts(["a cat", "two"]).shape == (2, 12)


def test_a_run_gives_its_newest_valid_checkpoint_and_its_teacher(tmp_path):
    student, teacher = towers(1), towers(2)
    for step, dual in ((1, towers(3)), (2, student), (3, towers(4))):
        tensors = {"model": dual.state_dict(), "teacher": teacher.state_dict()}
        checkpoint.save(tmp_path / "checkpoints", step, tensors, {}, {"open_clip_config": CONFIG, "state": STATE}, keep=9)
    damaged = tmp_path / "checkpoints" / "step-00000003" / "model.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    find = checkpoint.find_checkpoint
    assert load_model(str(tmp_path), find_checkpoint=find).fingerprint == TowerModel(student).fingerprint
    assert load_model(str(tmp_path), weights="teacher", find_checkpoint=find).fingerprint == TowerModel(teacher).fingerprint
    with pytest.raises(checkpoint.CheckpointError, match="damaged"):
        load_model(str(damaged.parent), find_checkpoint=find)
    with pytest.raises(OptionError, match="give one of its checkpoints"):
        load_model(str(tmp_path))


def test_specs_that_name_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    weights = write(tmp_path / "w.pt", b"")
    for spec, message in {
        "nowhere": "no such folder or file",
        str(tmp_path / "empty"): "expected open_clip_config.json beside",
        str(weights): "name their architecture",
        "hf:nowhere": "no such folder",
        "ViT-B-33:openai": "ViT-B-32",
        "timm:resnet5": "did you mean",
    }.items():
        with pytest.raises(OptionError, match=message):
            load_model(spec)
    with pytest.raises(OptionError, match="kept no teacher"):
        load_model(str(open_clip_folder(tmp_path / "m", towers())), weights="teacher")


def test_fingerprints_name_the_weights():
    dual = towers()
    before = TowerModel(dual).fingerprint
    assert before == TowerModel(towers()).fingerprint
    with torch.no_grad():
        dual.text.token_embedding.weight[5, 0] += 1e-6
    assert TowerModel(dual).fingerprint != before


def test_live_towers_are_left_as_they_were():
    dual = towers().train()
    dual.text.eval()
    model = TowerModel(dual)
    model.images(torch.randn(1, 3, 16, 16))
    model.texts(["x"])
    assert dual.training
    assert dual.visual.training
    assert not dual.text.training
    tower = model.copy()
    with torch.no_grad():
        next(tower.parameters()).add_(1)
    assert not torch.equal(next(tower.parameters()), next(dual.visual.parameters()))


def test_random_copies_are_drawn_from_the_callers_seed():
    model = TowerModel(towers())
    copies = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        copies.append(model.copy(random=True).state_dict()["conv1.weight"])
    assert torch.equal(copies[0], copies[1])
    assert not torch.equal(copies[0], copies[2])
    assert not torch.equal(copies[0], model.dual.visual.state_dict()["conv1.weight"])


def test_weights_alone_with_an_architecture(tmp_path):
    dual = towers(3)
    torch.save({"state_dict": {f"module.{k}": v for k, v in dual.state_dict().items()}}, tmp_path / "epoch_1.pt")
    (tmp_path / "arch.json").write_text(json.dumps(MODEL))
    model = load_model(str(tmp_path / "epoch_1.pt"), arch=str(tmp_path / "arch.json"))
    assert model.fingerprint == TowerModel(dual).fingerprint


def test_a_transformers_folder(tmp_path):
    from transformers import ViTConfig, ViTModel

    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16, "patch_size": 8}
    reference = ViTModel(ViTConfig(**size)).eval()
    reference.save_pretrained(tmp_path)
    model = load_model(f"hf:{tmp_path}")
    pixels = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model.images(pixels).pooled, reference(pixels).pooler_output.detach(), atol=1e-5, rtol=1e-4)
    assert model.texts(["x"]) is None
    kept, fresh = (model.copy(random=random).state_dict() for random in (False, True))
    name = next(key for key in kept if key.endswith("query.weight") or key.endswith("q_proj.weight"))
    assert torch.equal(kept[name], model.dual.visual.state_dict()[name])
    assert not torch.equal(kept[name], fresh[name])


def test_a_probe_beside_random_weights(coloured):
    options = {"data": str(coloured), "k": 3, "random": True, "features": "both", "seed": 4}
    found = [build_evaluator("knn", options)(TowerModel(towers()), Accelerator(cpu=True)).metrics for _ in range(2)]
    assert found[0] == found[1]
    assert {"acc1", "features_acc1", "random_acc1", "random_features_acc1", "chance"} <= found[0].keys()
    assert found[0]["random_acc1"] == 1.0  # six flat colours need no training


def finetune(data, **options):
    fixed = {"data": str(data), "steps": 10, "train_batch_size": 6, "lr": 5e-3, "threads": 2, "layer_decay": 1.0, "flip": 0.0}
    return build_evaluator("finetune", fixed | options)(TowerModel(towers()), Accelerator(cpu=True))


def test_finetune_learns_twice_the_same_and_beside_random_weights(coloured):
    first, second = finetune(coloured), finetune(coloured, random=False)
    assert second.metrics.items() <= first.metrics.items()
    assert first.tables["loss"] == second.tables["loss"]
    assert first.metrics["acc1"] == 1.0
    assert {"random_acc1", "acc5", "mean_per_class_recall", "chance"} <= first.metrics.keys()
    assert first.tables["loss"][0]["loss"] == pytest.approx(first.tables["random_loss"][0]["loss"])  # the head starts at zero: ln 3
    assert first.tables["loss"][-1]["loss"] < 0.5 * first.tables["loss"][0]["loss"]


def test_finetune_decays_its_rate_by_layer_and_warms_up(coloured, monkeypatch):
    rates, real = [], evaluator_module.set_learning_rate

    def notes(optimizer, config, step, steps):
        lr = real(optimizer, config, step, steps)
        rates.append({name: group["lr"] for group in optimizer.param_groups for name in group["names"]})
        return lr

    monkeypatch.setattr(evaluator_module, "set_learning_rate", notes)
    finetune(coloured, lr=1e-3, head_lr=10.0, layer_decay=0.5, warmup=0.4, random=False)
    warm = [step["head.weight"] for step in rates[:4]]
    assert warm == pytest.approx([0.25e-2, 0.5e-2, 0.75e-2, 1e-2])  # over four of ten updates
    assert rates[4]["head.weight"] == pytest.approx(1e-2)
    after = [step["head.weight"] for step in rates[4:]]
    assert after == sorted(after, reverse=True)
    assert after[-1] < 0.1 * after[0]
    peak = rates[3]  # embeddings, two blocks, what follows them, and the head
    depth = {
        "conv1.weight": 3,
        "transformer.resblocks.0.mlp.c_fc.weight": 2,
        "transformer.resblocks.1.mlp.c_fc.weight": 1,
        "ln_post.weight": 0,
    }
    assert {name: peak[f"tower.{name}"] for name in depth} == pytest.approx({name: 1e-3 * 0.5**above for name, above in depth.items()})


@pytest.mark.parametrize(("mode", "expected"), [("head", {"head"}), ("last_n", {"head", "tower.transformer.resblocks.1", "tower.ln_post"})])
def test_modes_train_what_they_say(mode, expected):
    from mmpretrain.evaluators.finetune import Classifier

    classifier = Classifier(TowerModel(towers()).copy(), 3)
    classifier.freeze(mode, 1)
    trained = {name for name, p in classifier.named_parameters() if p.requires_grad} - {"tower.proj"}
    assert all(any(name.startswith(part) for part in expected) for name in trained)
    assert all(any(name.startswith(part) for name in trained) for part in expected)


def test_too_many_blocks_are_refused(coloured):
    with pytest.raises(OptionError, match="this tower has 2 blocks"):
        finetune(coloured, mode="last_n", n=3)


def test_bad_training_images_are_counted(coloured, tmp_path):
    colour_folder(tmp_path / "train", ["red", "blue"], 4)
    colour_folder(tmp_path / "test", ["red", "blue"], 1)
    write(tmp_path / "train" / "red" / "bad.png", picture("red")[:30])
    with pytest.raises(RuntimeError, match=r"1 of 9 items cannot be used.*red/bad\.png"):
        finetune(tmp_path, steps=2, random=False)
    result = finetune(tmp_path, steps=2, random=False, max_bad_fraction=0.5)
    assert [row["key"] for row in result.tables["skipped"]] == ["train/red/bad.png"]


def test_a_run_without_a_contrastive_objective_gives_no_joint_features(tmp_path, coloured):
    weights = {name: value for name, value in towers().state_dict().items() if name.startswith("visual.")}
    documents = {"open_clip_config": CONFIG, "state": STATE}
    checkpoint.save(tmp_path / "a" / "checkpoints", 1, {"model": weights, "teacher": weights}, {}, documents, keep=1)
    whole = towers().state_dict() | {"logit_scale": torch.tensor(1.0)}
    checkpoint.save(tmp_path / "b" / "checkpoints", 1, {"model": whole, "teacher": towers().state_dict()}, {}, documents, keep=1)
    pixels = torch.randn(1, 3, 16, 16)
    for run, joint in (("a", False), ("b", True)):
        for chosen in ("student", "teacher"):
            model = load_model(str(tmp_path / run), weights=chosen, find_checkpoint=checkpoint.find_checkpoint)
            found = model.images(pixels)
            assert ((found.features is not None), model.texts(["x"]) is not None) == (joint, joint)
            assert found.pooled is not None
    alone = load_model(str(tmp_path / "a"), find_checkpoint=checkpoint.find_checkpoint)
    for kind in ("zero_shot", "retrieval"):
        data = (
            str(coloured / "test")
            if kind == "zero_shot"
            else str(write(tmp_path / "t.csv", f"file,caption\n{coloured}/test/red/0.png,x".encode()))
        )
        with pytest.raises(TypeError, match=rf"{kind} needs them.*no logit_scale"):
            build_evaluator(kind, {"data": data})(alone, Accelerator(cpu=True))
    assert build_evaluator("knn", {"data": str(coloured), "k": 1})(alone, Accelerator(cpu=True)).n == 9
