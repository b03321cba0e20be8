"""Released folders become training checkpoints and released folders again, without a bit changed."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from megatron_haplovl.checkpoint.folders import resolve_checkpoint
from megatron_haplovl.checkpoint.weight_files import WeightReader, write_weights
from megatron_haplovl.commands import convert
from megatron_haplovl.config.cli import flags_to_reach
from megatron_haplovl.config.files import read_config
from megatron_haplovl.config.presets import MODELS
from megatron_haplovl.config.schema import Config, DataConfig, ModelConfig, RopeScalingConfig
from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.conversion.export import export_checkpoint
from megatron_haplovl.conversion.released import open_released
from megatron_haplovl.conversion.verify import compare_logits
from megatron_haplovl.data.chat_template import load_chat_template
from megatron_haplovl.data.tokenizer import TextTokenizer, load_tokenizer
from megatron_haplovl.hf import HaploProcessor
from tests.fixtures.tiny_haplo import random_haplovl, save_training_checkpoint, tiny_model, train_tokenizer

_PLAIN = tiny_model(text_embedding="folded")
_LLAMA3 = RopeScalingConfig("llama3", 8.0, 1.0, 4.0, 16)
_MODELS: dict[str, ModelConfig] = {
    "plain": _PLAIN,
    "q/k/v biases": dataclasses.replace(_PLAIN, post=dataclasses.replace(_PLAIN.post, qkv_bias=True)),
    "gated": dataclasses.replace(_PLAIN, pre=dataclasses.replace(_PLAIN.pre, gated_mlp=True)),
    "gated, gelu by tanh": dataclasses.replace(
        _PLAIN, pre=dataclasses.replace(_PLAIN.pre, gated_mlp=True, activation="gelu_tanh")
    ),
    "all biases": dataclasses.replace(_PLAIN, post=dataclasses.replace(_PLAIN.post, qkv_bias=True, linear_bias=True)),
    "scaled RoPE": dataclasses.replace(_PLAIN, post=dataclasses.replace(_PLAIN.post, rope_scaling=_LLAMA3)),
    "divided RoPE": dataclasses.replace(
        _PLAIN, post=dataclasses.replace(_PLAIN.post, rope_scaling=RopeScalingConfig("linear", 4.0))
    ),
    "a budget of patches": dataclasses.replace(
        _PLAIN, vision=dataclasses.replace(_PLAIN.vision, image_token_budget=13)
    ),
    "padded to one tile": dataclasses.replace(
        _PLAIN, vision=VisionConfig(patch_size=4, image_size=8, image_aspect_ratio="pad", image_newline=False)
    ),
}
# Largest difference over ten seeds and all these models: 1.9e-5, with logits up to 8.0.
_TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return load_tokenizer(train_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def _export(checkpoint: Path, folder: Path, tokenizer: TextTokenizer) -> Path:
    export_checkpoint(checkpoint, folder, tokenizer, load_chat_template("vicuna_v1"))
    return folder


def _released(folder: Path, model: ModelConfig, tokenizer: TextTokenizer) -> tuple[Path, Path]:
    """A training checkpoint and its export."""
    config = Config(model=model, data=DataConfig(seq_length=96))
    step = save_training_checkpoint(random_haplovl(model), config, folder / "training")
    return step, _export(step, folder / "haplo", tokenizer)


def _import(folder: Path, save: Path, model: ModelConfig, *words: str) -> Path:
    flags = flags_to_reach(MODELS["haplovl-debug"], model)
    convert.main(["import", "--model", "haplovl-debug", *flags, "--haplo", str(folder), "--save", str(save), *words])
    return resolve_checkpoint(save)


def _assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = WeightReader(one), WeightReader(other)
    assert ours.names() == theirs.names()
    for name in ours.names():
        assert torch.equal(ours.get(name), theirs.get(name)), name


@pytest.mark.parametrize("name", _MODELS)
def test_training_to_haplo_to_training_to_haplo(
    tmp_path: Path, tokenizer: TextTokenizer, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The flags of a plain model are given, so that gates and biases must be found in the weights."""
    model = _MODELS[name]
    asked = dataclasses.replace(
        model,
        pre=dataclasses.replace(model.pre, gated_mlp=False),
        post=dataclasses.replace(model.post, qkv_bias=False, linear_bias=False),
        text_embedding="factored",
    )
    step, folder = _released(tmp_path, model, tokenizer)
    again = _import(folder, tmp_path / "again", asked, "--verify")
    report = capsys.readouterr().out
    assert read_config(again).model == model
    _assert_same_weights(again, step)
    difference = re.search(r"largest difference of a logit from the released model's: ([\d.e-]+)", report)
    assert difference is not None
    assert float(difference[1]) < _TOLERANCE
    assert ("--pre-gated-mlp" in report) == model.pre.gated_mlp
    assert ("--post-linear-bias" in report) == model.post.linear_bias
    assert "--text-embedding folded" in report

    once_more = _export(again, tmp_path / "haplo again", tokenizer)
    _assert_same_weights(once_more, folder)
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (once_more, folder))
    for settings in (ours, theirs):
        settings["base_config"].pop("max_position_embeddings")
        settings["pre_config"].pop("max_position_embeddings")
        settings["post_config"].pop("max_position_embeddings")
    assert ours == theirs


@pytest.mark.parametrize(
    ("tensor", "setting"),
    [
        ("model.layers.1.mlp.up_proj.weight", ("pre", "gated_mlp")),
        ("model.layers.0.mlp.up_proj.bias", ("pre", "gated_mlp")),
        ("model.layers.2.self_attn.k_proj.bias", ("post", "qkv_bias")),
        ("model.layers.3.self_attn.o_proj.bias", ("post", "linear_bias")),
        ("model.layers.2.mlp.gate_proj.bias", ("post", "linear_bias")),
        ("model.layers.3.mlp.down_proj.bias", ("post", "linear_bias")),
    ],
)
def test_one_moved_element_keeps_its_part(
    tmp_path: Path, tokenizer: TextTokenizer, tensor: str, setting: tuple[str, str]
) -> None:
    _, folder = _released(tmp_path, _PLAIN, tokenizer)
    reader = WeightReader(folder)
    state = {name: reader.get(name).clone() for name in reader.names()}
    state[tensor].view(-1)[-1] += 0.25
    write_weights(state, folder)
    step = _import(folder, tmp_path / "again", _PLAIN)
    model = read_config(step).model
    section, name = setting
    expected = dataclasses.replace(_PLAIN, **{section: dataclasses.replace(getattr(_PLAIN, section), **{name: True})})
    assert model == expected
    assert compare_logits(step, folder).largest_difference < _TOLERANCE
    _assert_same_weights(_export(step, tmp_path / "haplo again", tokenizer), folder)


def test_a_factored_embedding_comes_back_folded(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    step, folder = _released(tmp_path, tiny_model(), tokenizer)
    again = _import(folder, tmp_path / "again", tiny_model())
    assert read_config(again).model == _PLAIN
    folded = WeightReader(again).get("embedding.text.weight")
    training = WeightReader(step)
    product = training.get("embedding.text.weight") @ training.get("embedding.text_projector.weight").T
    torch.testing.assert_close(folded, product)
    _assert_same_weights(_export(again, tmp_path / "haplo again", tokenizer), folder)


def test_padding_rows_go_and_come_back(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    model = dataclasses.replace(_PLAIN, vocab_size=tokenizer.vocab_size)
    step, folder = _released(tmp_path, model, tokenizer)
    rows = WeightReader(folder).shape("lm_head.weight")[0]
    assert rows > model.vocab_size
    again = _import(folder, tmp_path / "again", model)
    _assert_same_weights(again, step)
    _assert_same_weights(_export(again, tmp_path / "haplo again", tokenizer), folder)

    reader = WeightReader(folder)
    state = {name: reader.get(name).clone() for name in reader.names()}
    state["lm_head.weight"][-1, 0] = 1.0
    write_weights(state, folder)
    with pytest.raises(SystemExit, match=rf"lm_head\.weight has trained rows .* give --vocab-size {rows}"):
        _import(folder, tmp_path / "trained", model)
    wider = dataclasses.replace(model, vocab_size=rows)
    _assert_same_weights(_export(_import(folder, tmp_path / "trained", wider), tmp_path / "x", tokenizer), folder)


def test_rotary_buffers_are_skipped_and_other_tensors_refused(
    tmp_path: Path, tokenizer: TextTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = _released(tmp_path, _PLAIN, tokenizer)
    reader = WeightReader(folder)
    state = {name: reader.get(name).clone() for name in reader.names()}
    write_weights({**state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}, folder)
    _import(folder, tmp_path / "again", _PLAIN)
    assert re.search(r"model +1 tensors  skipped: has no counterpart", capsys.readouterr().out)
    write_weights({**state, "model.layers.4.mlp.up_proj.bias": torch.zeros(40)}, folder)
    with pytest.raises(SystemExit, match=r"has no place for: model\.layers\.4\.mlp\.up_proj\.bias"):
        _import(folder, tmp_path / "other", _PLAIN)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("base_config", "num_hidden_layers", 3, "give --post-num-layers 3"),
        ("base_config", "rope_theta", 1e6, "give --post-rope-theta 1000000.0"),
        ("base_config", "image_newline", False, "give --no-image-newline"),
        ("base_config", "image_token_budget", 16, "give --image-token-budget 16"),
        ("base_config", "image_aspect_ratio", "anyres_max_6", "image_grid_pinpoints are not all grids of at most 6"),
        ("base_config", "hidden_act", "gelu", "base_config's hidden_act is 'gelu'; the model supports 'silu' only"),
        (
            "base_config",
            "rope_scaling",
            {"type": "linear", "factor": 2.0},
            "-type linear --post-rope-scaling-factor 2.0",
        ),
        (
            "base_config",
            "rope_scaling",
            {"rope_type": "yarn", "factor": 2.0},
            "rope_scaling .*'yarn'.* is not supported",
        ),
        ("base_config", "vocab_size", 63, "vocab_size is 63, but the model has 64; change --vocab-size"),
        ("pre_config", "hidden_act", "gelu", "give --pre-activation gelu"),
        ("pre_config", "hidden_act", "relu", "hidden_act 'relu' is none of quick_gelu, gelu, gelu_pytorch_tanh"),
        ("pre_config", "norm_mode", "rmsnorm", "norm_mode is 'rmsnorm'; the model supports 'layernorm' only"),
        ("pre_config", "rms_norm_eps", 1e-6, "rms_norm_eps is 1e-06; the model supports 1e-05 only"),
    ],
)
def test_another_model(
    tmp_path: Path, tokenizer: TextTokenizer, section: str, key: str, value: object, message: str
) -> None:
    _, folder = _released(tmp_path, _PLAIN, tokenizer)
    settings = json.loads((folder / "config.json").read_text())
    settings[section][key] = value
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        open_released(folder, _PLAIN)


def test_a_budget_of_patches_survives(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    """From the training's settings to the processor and back; and a folder without one may go on with one."""
    model = _MODELS["a budget of patches"]
    _, folder = _released(tmp_path, model, tokenizer)
    processor = HaploProcessor.from_pretrained(folder)
    assert processor.image_processor.vision == model.vision
    assert open_released(folder, model)[1] == model
    _, without = _released(tmp_path / "without", _PLAIN, tokenizer)
    assert HaploProcessor.from_pretrained(without).image_processor.vision == _PLAIN.vision
    assert open_released(without, model)[1] == model


def test_no_released_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        open_released(tmp_path, _PLAIN)
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(ValueError, match="model_type 'llava' is not 'haplo'"):
        open_released(tmp_path, _PLAIN)
