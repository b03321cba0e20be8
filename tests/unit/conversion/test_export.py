"""An exported model computes what the training model computes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from megatron_haplovl.checkpoint.weight_files import WeightReader, write_weights
from megatron_haplovl.config.schema import Config, DataConfig, ModelConfig, RecipeConfig
from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.conversion.export import check_written_tokenizer, export_checkpoint, haplo_processor
from megatron_haplovl.conversion.verify import compare_logits
from megatron_haplovl.data.chat_template import ConversationEncoder, load_chat_template
from megatron_haplovl.data.tokenizer import TextTokenizer, load_tokenizer
from megatron_haplovl.hf import HaploConfig, HaploForConditionalGeneration, HaploProcessor
from tests.chat import chat
from tests.conftest import byte_level_folder, llama_folder
from tests.fixtures.tiny_haplo import generate, random_haplovl, save_training_checkpoint, tiny_model, train_tokenizer

_PLAIN = tiny_model()
_PAD = VisionConfig(patch_size=4, image_size=8, image_aspect_ratio="pad", image_newline=False)
_MODELS: dict[str, ModelConfig] = {
    "any resolution": _PLAIN,
    "images as causal as text": tiny_model(image_attention="causal"),
    "folded embedding": tiny_model(text_embedding="folded"),
    "q/k/v biases": tiny_model(post=dataclasses.replace(_PLAIN.post, qkv_bias=True, norm_epsilon=1e-6)),
    "padded to one tile": tiny_model(vision=_PAD),
    "stretched, with newlines": tiny_model(
        vision=dataclasses.replace(_PAD, image_aspect_ratio="resize", image_newline=True)
    ),
    "exact gelu": tiny_model(pre=dataclasses.replace(_PLAIN.pre, activation="gelu", rope_theta=77.0)),
    "gelu by tanh": tiny_model(pre=dataclasses.replace(_PLAIN.pre, activation="gelu_tanh")),
}
# Largest difference over ten seeds and all these models: 1.4e-5, with logits up to 7.5.
_TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return load_tokenizer(train_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def _export(folder: Path, model: ModelConfig, tokenizer: TextTokenizer, **options: Any) -> tuple[Path, Path]:
    config = Config(model=model, data=DataConfig(seq_length=96))
    step = save_training_checkpoint(random_haplovl(model), config, folder / "training")
    export_checkpoint(folder / "training", folder / "haplo", tokenizer, load_chat_template("vicuna_v1"), **options)
    return step, folder / "haplo"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", _MODELS)
def test_logits(tmp_path: Path, tokenizer: TextTokenizer, name: str, implementation: str) -> None:
    step, folder = _export(tmp_path, _MODELS[name], tokenizer)
    result = compare_logits(step, folder, attn_implementation=implementation)
    assert result.largest_logit > 1
    assert result.largest_difference < _TOLERANCE


def test_the_comparison_sees_a_changed_weight(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    step, folder = _export(tmp_path, _PLAIN, tokenizer)
    reader = WeightReader(folder)
    state = {name: reader.get(name) for name in reader.names()}
    state["model.layers.1.mlp.up_proj.bias"][0] += 0.1
    write_weights(state, folder)
    assert compare_logits(step, folder).largest_difference > 10 * _TOLERANCE


def test_auto_classes_load_the_folder(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    _, folder = _export(tmp_path, _PLAIN, tokenizer)
    assert isinstance(AutoConfig.from_pretrained(folder), HaploConfig)
    assert isinstance(AutoModelForImageTextToText.from_pretrained(folder), HaploForConditionalGeneration)
    processor = AutoProcessor.from_pretrained(folder)
    assert isinstance(processor, HaploProcessor)
    assert load_tokenizer(folder).fingerprint == tokenizer.fingerprint


def test_files_of_the_released_format(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    """Names and keys as the format description gives them."""
    _, folder = _export(tmp_path, _PLAIN, tokenizer)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "haplo"
    assert config["architectures"] == ["HaploForConditionalGeneration"]
    base, pre = config["base_config"], config["pre_config"]
    assert (base["hidden_size"], base["num_hidden_layers"], base["norm_mode"], base["attention_rope"]) == (
        *(24, 2, "rmsnorm"),
        False,
    )
    assert (pre["hidden_size"], pre["num_hidden_layers"], pre["norm_mode"], pre["attention_rope"]) == (
        *(16, 2, "layernorm"),
        True,
    )
    assert (base["rope_theta"], pre["rope_theta"], base["rope_scaling"]) == (500.0, 10000.0, None)
    assert (base["image_aspect_ratio"], base["image_newline"], base["default_image_size"]) == ("anyres_max_4", True, 8)
    assert [16, 16] in base["image_grid_pinpoints"]
    assert [32, 32] not in base["image_grid_pinpoints"]
    assert (base["image_token_index"], base["video_token_index"]) == tokenizer.placeholder_ids

    shapes = {name: WeightReader(folder).shape(name) for name in WeightReader(folder).names()}
    rows = base["vocab_size"]
    assert shapes["model.embed_tokens.weight"] == (rows, 16)
    assert shapes["lm_head.weight"] == (rows, 24)
    assert shapes["model.patch_embed.proj.weight"] == (16, 3, 4, 4)
    assert shapes["model.pre_pos_embed"] == (1, 4, 16)
    assert shapes["model.layers.1.mlp.gate_proj.bias"] == (24,)
    assert shapes["model.layers.2.self_attn.k_proj.bias"] == (12,)
    assert "model.layers.1.input_layernorm.bias" in shapes
    assert "model.layers.2.input_layernorm.bias" not in shapes
    assert "model.layers.4.input_layernorm.weight" not in shapes

    for name in ("preprocessor_config.json", "video_processor/preprocessor_config.json"):
        assert json.loads((folder / name).read_text())["image_processor_type"] == "HaploImageProcessor"
    assert json.loads((folder / "processor_config.json").read_text())["num_image_tokens"] == 4
    # A class that transformers 4 knows as well, and no token types, which the model would refuse.
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]


def test_marks_beyond_the_vocabulary_get_zero_rows_and_are_never_generated(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    _, folder = _export(tmp_path, model, tokenizer)
    rows = max(tokenizer.placeholder_ids) + 1
    assert rows == model.vocab_size + 2
    head = WeightReader(folder).get("lm_head.weight")
    assert head.shape[0] == rows
    assert not head[model.vocab_size :].any()
    assert GenerationConfig.from_pretrained(folder).suppress_tokens == list(tokenizer.placeholder_ids)

    # With every real logit negative, only suppression keeps the zero rows from winning.
    loaded = HaploForConditionalGeneration.from_pretrained(folder)
    for parameter in (loaded.model.norm.weight, loaded.lm_head.weight):
        parameter.data[:] = 0
    loaded.lm_head.weight.data[: model.vocab_size] = -1.0
    loaded.model.norm.weight.data[:] = 1.0
    loaded.model.layers[-1].mlp.down_proj.bias.data[:] = 100.0
    tokens = generate(loaded, {"input_ids": torch.tensor([[5, 6]])}, max_new_tokens=3, eos_token_id=None)
    assert int(tokens.max()) < model.vocab_size


def test_end_of_an_answer_comes_from_the_template(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    _, folder = _export(tmp_path, _PLAIN, tokenizer)
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [tokenizer.hf.eos_token_id]


def test_chat_messages_become_the_tokens_of_training(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    """The processor renders the prompt with which preprocessing begins the same conversation."""
    _, folder = _export(tmp_path, _PLAIN, tokenizer)
    processor = HaploProcessor.from_pretrained(folder)
    question: Any = [{"type": "image"}, {"type": "text", "text": "what color circle"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    ids = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    encoder = ConversationEncoder(tokenizer, load_chat_template("vicuna_v1"))
    messages = [
        {"role": "user", "content": "<image>\nwhat color circle"},
        {"role": "assistant", "content": "red"},
    ]
    encoded = encoder.encode(chat(messages))
    first_trained = int(encoded.loss_mask.argmax())
    assert ids == encoded.token_ids[:first_trained].tolist()


@pytest.mark.parametrize("kind", ["legacy llama", "llama", "sentencepiece", "byte level"])
def test_written_tokenizer_reads_what_the_training_read(tmp_path: Path, kind: str, tiny_spm_model: Path) -> None:
    """Whatever the tokenizer was loaded from: LlamaTokenizer, for one, does not write down that it is a legacy one."""
    loaded_from = {
        "legacy llama": lambda: llama_folder(tmp_path / "llama", legacy=True),
        "llama": lambda: llama_folder(tmp_path / "llama", legacy=False),
        "sentencepiece": lambda: tiny_spm_model,
        "byte level": lambda: byte_level_folder(tmp_path / "bytes"),
    }[kind]()
    trained_with = load_tokenizer(loaded_from)
    _, folder = _export(tmp_path, tiny_model(vocab_size=trained_with.vocab_size), trained_with)
    text = "<s>USER: <image>\nWhat is it?<video> </s>\n USER:</s>red"
    ids = HaploProcessor.from_pretrained(folder).tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == trained_with.encode(text)[0]


def test_tokenizer_that_would_be_written_differently(tmp_path: Path) -> None:
    legacy, new = (load_tokenizer(llama_folder(tmp_path / str(legacy), legacy=legacy)) for legacy in (True, False))
    processor = haplo_processor(_PLAIN, new, load_chat_template("vicuna_v1"))
    check_written_tokenizer(processor, new)
    with pytest.raises(ValueError, match="the exported folder's tokenizer would read texts differently"):
        check_written_tokenizer(processor, legacy)


def test_bfloat16(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    _, folder = _export(tmp_path, _PLAIN, tokenizer, dtype=torch.bfloat16)
    reader = WeightReader(folder)
    assert {reader.get(name).dtype for name in reader.names()} == {torch.bfloat16}
    assert HaploForConditionalGeneration.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16


def test_nothing_but_an_earlier_export_is_overwritten(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    step, folder = _export(tmp_path, _PLAIN, tokenizer)
    template = load_chat_template("vicuna_v1")
    export_checkpoint(step, folder, tokenizer, template)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").touch()
    for other in (step, step.parent, tmp_path / "other"):
        before = {path: path.stat().st_mtime_ns for path in other.iterdir()}
        with pytest.raises(ValueError, match="holds other files than an earlier export"):
            export_checkpoint(step, other, tokenizer, template)
        assert {path: path.stat().st_mtime_ns for path in other.iterdir()} == before


def test_formats_are_kept_tensor_by_tensor(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    network = random_haplovl(_PLAIN)
    network.lm_head.bfloat16()
    network.embedding.text.bfloat16()
    step = save_training_checkpoint(network, Config(model=_PLAIN, data=DataConfig(seq_length=96)), tmp_path)
    export_checkpoint(step, tmp_path / "haplo", tokenizer, load_chat_template("vicuna_v1"))
    reader = WeightReader(tmp_path / "haplo")
    kept = {name: reader.get(name).dtype for name in reader.names()}
    half = {name for name, dtype in kept.items() if dtype == torch.bfloat16}
    assert half == {"lm_head.weight", "model.embed_tokens.weight"}


def test_what_is_refused(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    template = load_chat_template("vicuna_v1")
    with pytest.raises(ValueError, match="stage-1 checkpoint"):
        config = Config(model=_PLAIN, recipe=RecipeConfig(recipe="distill"))
        save_training_checkpoint(random_haplovl(_PLAIN), config, tmp_path / "stage1")
        export_checkpoint(tmp_path / "stage1", tmp_path / "out", tokenizer, template)
    with pytest.raises(ValueError, match=r"trained with another tokenizer"):
        _export(tmp_path / "small", tiny_model(vocab_size=tokenizer.vocab_size - 1), tokenizer)
    with pytest.raises(ValueError, match="--pre-layernorm-epsilon 1e-06"):
        model = tiny_model(pre=dataclasses.replace(_PLAIN.pre, layernorm_epsilon=1e-6))
        _export(tmp_path / "epsilon", model, tokenizer)
    assert not (tmp_path / "out").exists()
