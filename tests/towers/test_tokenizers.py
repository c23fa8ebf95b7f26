"""A model's tokenizer: its options count wherever the model comes from, its files travel with it, and the text tower pools at its end."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mmpretrain.assembly import build_model, check_end, check_vocabulary
from mmpretrain.checkpoint import find_checkpoint, save_run
from mmpretrain.config.build import OptionError
from mmpretrain.config.recipe import Config, assemble
from mmpretrain.data.text import get_tokenizer
from mmpretrain.evaluators.models import load_model
from mmpretrain.export import export_open_clip
from mmpretrain.optim import OptimConfig, build_optimizer, parameter_groups
from mmpretrain.towers.specs import build_towers
from tests.tiny import MODEL

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "the", "dog", "Dog", "walrus", "zebra", "xylophone", ","]
TEXTS = ["a dog", "the Zebra, a dog", "the DOG"]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Path:
    """A folder with a transformers tokenizer like BERT's, of a dozen words: its end is id 2, lower than any word."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    folder = tmp_path_factory.mktemp("vocabulary")
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)
    return folder


def config(text: dict) -> dict:
    return MODEL | {"text_cfg": MODEL["text_cfg"] | text}


def recipe(text: dict) -> Config:
    options = {"model": config(text), "steps": 1, "sources": {"pairs": {"shards": "x"}}, "objectives": {"clip": {"source": "pairs"}}}
    return assemble(options)


def wanted(text: dict) -> torch.Tensor:
    """What open_clip makes of the texts under these fields."""
    if "hf_tokenizer_name" in text:
        return open_clip.tokenizer.HFTokenizer(text["hf_tokenizer_name"], context_length=16, **text["tokenizer_kwargs"])(TEXTS)
    return open_clip.SimpleTokenizer(context_length=16, **text["tokenizer_kwargs"])(TEXTS)


@pytest.mark.parametrize("place", ["recipe", "json", "folder"])
@pytest.mark.parametrize("kwargs", [{"strip_sep_token": True}, {"clean": "canonicalize"}])
@pytest.mark.parametrize("own", [True, False])
def test_tokenizer_kwargs_are_honoured_wherever_the_model_comes_from(place, kwargs, own, vocabulary, tmp_path):
    if not own and "strip_sep_token" in kwargs:
        pytest.skip("an option of transformers tokenizers")
    text = {"tokenizer_kwargs": kwargs} | ({"hf_tokenizer_name": str(vocabulary)} if own else {})
    model: dict | str = config(text)
    if place == "json":
        (tmp_path / "model.json").write_text(json.dumps(model))
        model = str(tmp_path / "model.json")
    elif place == "folder":
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))
        model = str(tmp_path)
    tokenizer = get_tokenizer(build_towers(model).tokenizer)
    assert torch.equal(tokenizer.encode(TEXTS, 16), wanted(text))
    plain = wanted(text | {"tokenizer_kwargs": {}})
    assert not torch.equal(wanted(text), plain), "this option would change nothing"


def test_tokenizer_files_in_a_model_folder_are_used(vocabulary, tmp_path):
    transformers.AutoTokenizer.from_pretrained(vocabulary).save_pretrained(tmp_path)
    text = {"hf_tokenizer_name": "nobody/nothing", "tokenizer_kwargs": {"strip_sep_token": True}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config(text), "preprocess_cfg": {}}))
    tokenizer = get_tokenizer(build_towers(str(tmp_path)).tokenizer)
    assert torch.equal(tokenizer.encode(TEXTS, 16), wanted(text | {"hf_tokenizer_name": str(vocabulary)}))


def test_an_export_and_a_checkpoint_hold_what_open_clips_get_tokenizer_needs(vocabulary, tmp_path, monkeypatch):
    text = {"hf_tokenizer_name": str(vocabulary), "tokenizer_kwargs": {"clean": "canonicalize"}, "pool_type": "eos", "eos_id": 2}
    model, _ = build_model(recipe(text))
    groups = parameter_groups(list(model.named_parameters()), OptimConfig(), {})
    state = {"step": 1, "positions": {}, "skipped_steps": 0}
    save_run(tmp_path / "run", 1, model, None, build_optimizer(groups, OptimConfig()), state)
    export_open_clip(model.towers, {}, tmp_path / "export")
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "export", find_checkpoint(tmp_path / "run")):
        assert torch.equal(open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS), wanted(text))
        loaded = load_model(str(folder))
        assert loaded.dual.tokenizer == f"local-dir:{folder}"
        torch.testing.assert_close(loaded.texts(TEXTS), model.towers.eval().text(wanted(text)).features, rtol=1e-4, atol=1e-5)


def test_tokenizers_that_cannot_be_had_are_named_in_one_line(tmp_path):
    text = {"hf_tokenizer_name": str(tmp_path), "tokenizer_kwargs": {"clean": "canonicalize"}}
    for fields, told in (
        (text, "cannot be loaded"),
        ({"tokenizer_kwargs": {"klean": "lower"}}, "klean"),
        ({"tokenizer_kwargs": {"reduction_mask": "random"}}, "at random, which no seed of a run repeats"),
    ):
        with pytest.raises(ValueError, match=told) as error:
            get_tokenizer(build_towers(config(fields)).tokenizer)
        assert "\n" not in str(error.value)


def test_a_tower_that_pools_where_its_tokenizer_puts_no_end_is_refused(vocabulary):
    other = {"hf_tokenizer_name": str(vocabulary)}
    for text in (
        other,  # argmax: the highest id is a word's
        other | {"pool_type": "eos", "eos_id": 99},
        {"pool_type": "eos", "eos_id": 2},  # CLIP's own end is 49407
        {"pool_type": "first"},  # sees nothing but itself under a causal mask
        {"pool_type": "eos", "eos_id": 2, "qk_norm": True},  # open_clip's own tower
    ):
        with pytest.raises(OptionError, match="last word get equal features"):
            build_model(recipe(text))
    for text in (
        {},
        other | {"pool_type": "eos", "eos_id": 2},
        other | {"pool_type": "last", "no_causal_mask": True},
        {"pool_type": "eos", "eos_id": 49407},
        {"pool_type": "first", "no_causal_mask": True},
        {"context_length": 3},  # too short for two captions to differ
        {"ls_init_value": 1e-6},
    ):
        build_model(recipe(text))


def test_a_transformers_tower_smaller_than_its_tokenizers_vocabulary_is_refused(vocabulary, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    for size in (8, len(WORDS)):
        folder = tmp_path / str(size)
        bert = transformers.BertConfig(vocab_size=size, max_position_embeddings=16, pad_token_id=0, **sizes)
        transformers.BertModel(bert).save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(vocabulary).save_pretrained(folder)
    with pytest.raises(OptionError, match=r"vocab_size is 8, but the tokenizer .* has 12 ids"):
        check_vocabulary(build_towers(f"hf:{tmp_path}/8"))
    check_vocabulary(dual := build_towers(f"hf:{tmp_path}/12"))
    check_end(dual)
