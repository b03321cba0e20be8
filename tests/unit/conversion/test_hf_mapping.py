"""Imported weights against transformers' own modules, which compute the reference."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
)

from megatron_haplovl.checkpoint.weight_files import WeightReader, write_weights
from megatron_haplovl.config.stages import FINETUNE, PRETRAIN
from megatron_haplovl.conversion.hf_compatibility import language_config_of, vision_config_of
from megatron_haplovl.conversion.hf_mapping import export_to_haplo, haplo_table
from megatron_haplovl.conversion.hf_sources import open_language_model, open_vision_tower
from megatron_haplovl.kernels.mask import MixedMask
from megatron_haplovl.model.attention_inputs import AttentionInputs
from megatron_haplovl.model.embeddings import cut_patches
from megatron_haplovl.model.haplovl import HaploVL
from tests.fixtures.tiny_haplo import random_haplovl, tiny_model

# Largest differences over ten seeds: 1.9e-6 in the vision blocks (values up to 7.3), 6.6e-7 in the logits (2.4).
_TOLERANCE = 1e-5


def load_vision_model(*arguments):
    weights = open_vision_tower(*arguments)
    return {name: weights.get(name) for name in weights.names()}


def load_language_model(*arguments, **settings):
    weights = open_language_model(*arguments, **settings)
    return {name: weights.get(name) for name in weights.names()}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _randomize(network: torch.nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def _load(network: HaploVL, weights: dict[str, torch.Tensor]) -> None:
    missing, unexpected = network.load_state_dict(weights, strict=False)
    assert not unexpected
    assert not set(missing) & set(weights)


def _causal_context(batch: int, length: int) -> AttentionInputs:
    end = torch.arange(1, length + 1, dtype=torch.int32).expand(batch, length)
    return AttentionInputs(MixedMask(torch.zeros_like(end), end), torch.arange(length).expand(batch, length))


@pytest.fixture
def vision_folder(tmp_path: Path) -> Path:
    tower = CLIPVisionModel(vision_config_of(tiny_model()))
    _randomize(tower)
    tower.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    language_model = LlamaForCausalLM(language_config_of(tiny_model()))
    _randomize(language_model)
    language_model.save_pretrained(tmp_path)
    return tmp_path


def test_vision_blocks_compute_what_clip_computes(vision_folder: Path) -> None:
    """Patches, positions, pre_norm and blocks; at position 0 RoPE is the identity, and CLIP has no other difference."""
    model = tiny_model()
    network = random_haplovl(model)
    _load(network, load_vision_model(vision_folder, model))
    tower = CLIPVisionModel.from_pretrained(vision_folder, attn_implementation="eager").eval()
    # The names of the inner modules differ between releases of transformers.
    inner = getattr(tower, "vision_model", tower)
    pixels = torch.randn(3, 3, 8, 8)

    theirs = inner.embeddings(pixels)[:, 1:]
    cells = model.vision.cells_per_tile
    ours = network.embedding.patch(cut_patches(pixels, 4)).view(3, cells, -1) + network.embedding.position
    torch.testing.assert_close(ours, theirs, atol=_TOLERANCE, rtol=0)

    theirs, ours = inner.pre_layrnorm(theirs), network.embedding.pre_norm(ours)
    everything = torch.full((3, cells), cells, dtype=torch.int32)
    context = AttentionInputs(MixedMask(torch.zeros_like(everything), everything), torch.zeros(3, cells).long())
    for block in network.pre_decoder:
        ours = block(ours, context)
    for layer in inner.encoder.layers:
        output = layer(theirs, attention_mask=None)
        theirs = output[0] if isinstance(output, tuple) else output
    torch.testing.assert_close(ours, theirs, atol=_TOLERANCE, rtol=0)


def test_full_clip_and_old_names_give_the_same_weights(tmp_path: Path, vision_folder: Path) -> None:
    model = tiny_model()
    tower = CLIPVisionModel.from_pretrained(vision_folder)
    expected = load_vision_model(vision_folder, model)

    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text["vocab_size"] = 50000
    full = CLIPModel(CLIPConfig(vision_config=vision_config_of(model).to_dict(), text_config=text))
    bare = {name.removeprefix("vision_model."): tensor for name, tensor in tower.state_dict().items()}
    full.vision_model.load_state_dict(bare)
    full.save_pretrained(tmp_path / "full")

    # OpenAI's own folder: pickled, with the prefix, and a configuration that leaves defaults out.
    old = tmp_path / "old"
    old.mkdir()
    torch.save({f"vision_model.{name}": tensor for name, tensor in bare.items()}, old / "pytorch_model.bin")
    settings = {"model_type": "clip", "vision_config": vision_config_of(model).to_diff_dict()}
    (old / "config.json").write_text(json.dumps(settings))

    for folder in (tmp_path / "full", old):
        found = load_vision_model(folder, model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def _reference_logits(language_model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return language_model.eval()(tokens).logits


def _our_logits(network: HaploVL, tokens: torch.Tensor) -> torch.Tensor:
    """The post-decoder alone, as the language model it came from: embedding, blocks, norm, head."""
    context = _causal_context(*tokens.shape)
    hidden = network.embedding.text(tokens)
    for block in network.post_decoder:
        hidden = block(hidden, context)
    with torch.no_grad():
        return network.lm_head.logits(network.final_norm(hidden))


@pytest.mark.parametrize("tied", [False, True])
def test_llama(tmp_path: Path, tied: bool) -> None:
    model = tiny_model()
    language_model = LlamaForCausalLM(language_config_of(model, tie_word_embeddings=tied))
    _randomize(language_model)
    language_model.save_pretrained(tmp_path)
    network = random_haplovl(model)
    _load(network, load_language_model(tmp_path, model, stage=FINETUNE))
    tokens = torch.randint(0, model.vocab_size, (2, 9))
    expected = _reference_logits(language_model, tokens)
    torch.testing.assert_close(_our_logits(network, tokens), expected, atol=_TOLERANCE, rtol=1e-5)


def test_qwen2_with_biases(tmp_path: Path) -> None:
    plain = tiny_model()
    model = dataclasses.replace(plain, post=dataclasses.replace(plain.post, qkv_bias=True))
    language_model = Qwen2ForCausalLM(language_config_of(model))
    _randomize(language_model)
    language_model.save_pretrained(tmp_path)
    network = random_haplovl(model)
    _load(network, load_language_model(tmp_path, model, stage=FINETUNE))
    tokens = torch.randint(0, model.vocab_size, (2, 9))
    expected = _reference_logits(language_model, tokens)
    torch.testing.assert_close(_our_logits(network, tokens), expected, atol=_TOLERANCE, rtol=1e-5)
    with pytest.raises(ValueError, match="--.no-.post-qkv-bias"):
        load_language_model(tmp_path, plain, stage=FINETUNE)


def test_every_parameter_of_a_post_decoder_is_loaded(llama_folder: Path) -> None:
    model = tiny_model()
    loaded = load_language_model(llama_folder, model, stage=FINETUNE)
    parameters = dict(HaploVL(model).named_parameters())
    needed = {name for name in parameters if name.startswith(("post_decoder.", "final_norm.", "lm_head."))}
    assert set(loaded) == needed | {"embedding.text.weight"}


def test_embedding_only_does_not_look_at_the_blocks(llama_folder: Path) -> None:
    model = tiny_model()
    deeper = dataclasses.replace(model, post=dataclasses.replace(model.post, num_layers=9, rope_theta=1.0))
    weights = load_language_model(llama_folder, deeper, stage=PRETRAIN)
    assert list(weights) == ["embedding.text.weight"]
    assert torch.equal(weights["embedding.text.weight"], WeightReader(llama_folder).get("model.embed_tokens.weight"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_size", 32, r"hidden_size is 32, but the model has 24; change --post-hidden-size"),
        ("num_hidden_layers", 3, "--post-num-layers"),
        ("num_attention_heads", 2, "--post-num-attention-heads"),
        ("num_key_value_heads", 4, "--post-num-key-value-heads"),
        ("intermediate_size", 41, "--post-ffn-hidden-size"),
        ("vocab_size", 65, "--vocab-size"),
        ("rms_norm_eps", 1e-6, "--post-norm-epsilon"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4}, "rope_theta is 10000.0.*--post-rope-theta"),
        ("rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}, "rope_scaling"),
        ("hidden_act", "gelu", "hidden_act"),
        ("attention_bias", True, "attention_bias"),
        ("head_dim", 8, "head_dim"),
        ("model_type", "gpt2", "neither 'llama' nor 'qwen2'"),
    ],
)
def test_language_model_that_does_not_fit(llama_folder: Path, key: str, value: object, message: str) -> None:
    path = llama_folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ValueError, match=message):
        load_language_model(llama_folder, tiny_model(), stage=FINETUNE)


def test_rope_settings_of_transformers_4(llama_folder: Path) -> None:
    path = llama_folder / "config.json"
    settings = json.loads(path.read_text())
    del settings["rope_parameters"]
    path.write_text(json.dumps({**settings, "rope_theta": 500.0, "rope_scaling": None}))
    load_language_model(llama_folder, tiny_model(), stage=FINETUNE)
    path.write_text(json.dumps({**settings, "rope_theta": 501.0}))
    with pytest.raises(ValueError, match=r"rope_theta is 501\.0"):
        load_language_model(llama_folder, tiny_model(), stage=FINETUNE)
    path.write_text(json.dumps({**settings, "rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}))
    with pytest.raises(ValueError, match="rope_scaling"):
        load_language_model(llama_folder, tiny_model(), stage=FINETUNE)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("patch_size", 2, "--patch-size"),
        ("hidden_act", "gelu", "hidden_act is 'gelu', but the model has 'quick_gelu'; change --pre-activation"),
        ("layer_norm_eps", 1e-6, "--pre-layernorm-epsilon"),
        ("num_attention_heads", 4, "--pre-num-attention-heads"),
        ("num_channels", 1, "num_channels"),
        (
            "model_type",
            "dinov2",
            r"'dinov2' is not a vision model that the pre-decoder can inherit from \(CLIP or SigLIP\)",
        ),
    ],
)
def test_vision_model_that_does_not_fit(vision_folder: Path, key: str, value: object, message: str) -> None:
    path = vision_folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ValueError, match=message):
        load_vision_model(vision_folder, tiny_model())


def test_folders_that_are_none(tmp_path: Path, llama_folder: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        load_vision_model(tmp_path / "missing", tiny_model())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_language_model(tmp_path / "empty", tiny_model(), stage=PRETRAIN)
    state = {name: WeightReader(llama_folder).get(name) for name in WeightReader(llama_folder).names()}
    state["model.norm.weight"] = torch.zeros(3)
    write_weights(state, llama_folder)
    with pytest.raises(ValueError, match=r"model\.norm\.weight has the shape \[3\], but the model needs \[24\]"):
        load_language_model(llama_folder, tiny_model(), stage=FINETUNE)


@pytest.mark.parametrize("text_embedding", ["factored", "folded"])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_the_haplo_table_covers_every_parameter_once(text_embedding: str, qkv_bias: bool) -> None:
    model = tiny_model(text_embedding=text_embedding)
    model = dataclasses.replace(model, post=dataclasses.replace(model.post, qkv_bias=qkv_bias))
    table = haplo_table(model, rows=66)
    ours = [(name, shape) for entry in table for name, shape in zip(entry.ours, entry.our_shapes, strict=True)]
    parameters = {name: tuple(parameter.shape) for name, parameter in HaploVL(model).named_parameters()}
    assert len(ours) == len(dict(ours))
    assert dict(ours) == parameters
    assert len({entry.theirs for entry in table}) == len(table)


def test_reading_a_table_inverts_writing_it(tmp_path: Path) -> None:
    model = tiny_model(text_embedding="folded")
    network = random_haplovl(model)
    write_weights(dict(network.named_parameters()), tmp_path)
    exported = dict(export_to_haplo(WeightReader(tmp_path), model, rows=70))
    for entry in haplo_table(model, rows=70):
        assert tuple(exported[entry.theirs].shape) == entry.their_shape
        if entry.constant is None:
            assert entry.to_ours is not None
            assert torch.equal(entry.to_ours(exported[entry.theirs]), network.get_parameter(entry.ours[0]))
        else:
            assert (exported[entry.theirs] == entry.constant).all()
    assert not exported["lm_head.weight"][64:].any()


def test_folding_rounds_once(tmp_path: Path) -> None:
    """The product is taken in fp32 of what is stored, and only then brought to the format of the export."""
    model = tiny_model()
    network = random_haplovl(model).to(torch.bfloat16)
    write_weights(dict(network.named_parameters()), tmp_path)
    exact = network.embedding.text.weight.double() @ network.embedding.text_projector.weight.double().T
    name = "model.embed_tokens.weight"
    wide = dict(export_to_haplo(WeightReader(tmp_path), model, dtype=torch.float32))[name]
    torch.testing.assert_close(wide.double(), exact, atol=1e-6, rtol=1e-6)
    assert torch.equal(dict(export_to_haplo(WeightReader(tmp_path), model))[name], exact.to(torch.bfloat16))


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    model = tiny_model()
    state = dict(random_haplovl(model).named_parameters())
    write_weights({**state, "distillation.logit_scale": torch.zeros(())}, tmp_path)
    with pytest.raises(ValueError, match="stage-1 checkpoint"):
        dict(export_to_haplo(WeightReader(tmp_path), model))
    write_weights({**state, "tail.weight": torch.zeros(1)}, tmp_path)
    with pytest.raises(ValueError, match=r"cannot hold: tail\.weight"):
        dict(export_to_haplo(WeightReader(tmp_path), model))
    del state["connector.weight"]
    write_weights(state, tmp_path)
    with pytest.raises(ValueError, match=r"no connector\.weight"):
        dict(export_to_haplo(WeightReader(tmp_path), model))
