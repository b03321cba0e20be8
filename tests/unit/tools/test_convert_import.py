"""convert_checkpoint.py import: Hugging Face folders become checkpoints that a run starts from."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    LlamaForCausalLM,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from megatron_haplovl.checkpoint.folders import read_iteration, resolve_checkpoint
from megatron_haplovl.checkpoint.weight_files import WeightReader, write_weights
from megatron_haplovl.config.cli import build_config, flags_to_reach
from megatron_haplovl.config.files import read_config
from megatron_haplovl.config.presets import MODELS
from megatron_haplovl.config.schema import Config, InitConfig, ModelConfig, RopeScalingConfig
from megatron_haplovl.conversion.hf_compatibility import language_config_of, vision_config_of
from megatron_haplovl.conversion.verify_import import compare_language_model, compare_vision_tower
from megatron_haplovl.model.haplovl import HaploVL, HaploVLForDistillation
from megatron_haplovl.model.initialization import initial_value
from megatron_haplovl.parallel.sharded_model import ShardedModel
from megatron_haplovl.training.initial_weights import fill_weights
from tests.fixtures.tiny_haplo import random_haplovl, save_training_checkpoint, tiny_model
from tools import convert_checkpoint

_LLAMA3 = RopeScalingConfig("llama3", 8.0, 1.0, 4.0, 16)
# Largest differences over ten seeds and all cases below: 1.1e-6 of a layer (values up to 6.7), 1.7e-6 at the end.
_TOLERANCE = 1e-5


def _save(network: torch.nn.Module, folder: Path, seed: int = 1) -> Path:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole CLIP, text tower and all."""
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text["vocab_size"] = 50000
    config = CLIPConfig(vision_config=vision_config_of(tiny_model()).to_dict(), text_config=text)
    return _save(CLIPModel(config), tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(LlamaForCausalLM(language_config_of(tiny_model())), tmp_path_factory.mktemp("llama"))


def _flags(model: ModelConfig) -> list[str]:
    return ["--model", "haplovl-debug", *flags_to_reach(MODELS["haplovl-debug"], model)]


def _import(save: Path, model: ModelConfig, *words: str) -> Path:
    convert_checkpoint.main(["import", *_flags(model), "--save", str(save), *words])
    return resolve_checkpoint(save)


def _fill(
    model: ModelConfig, init: InitConfig, *, stage1: bool = False, seed: int = 5
) -> tuple[dict[str, torch.Tensor], str]:
    """The weights with which a run starts, and its report."""
    network = HaploVLForDistillation(model, 16) if stage1 else HaploVL(model)
    for parameter in network.parameters():
        parameter.data.fill_(torch.nan)
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
    config = build_config("pretrain" if stage1 else "finetune", "haplovl-debug", {("run", "seed"): seed})
    config = dataclasses.replace(config, model=model, init=init)
    report = fill_weights(ShardedModel(network, shapes), config)
    return {name: parameter.detach() for name, parameter in network.named_parameters()}, report


def test_a_run_starts_as_from_the_folders_themselves(
    tmp_path: Path, clip: Path, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model()
    words = ("--vision-teacher", str(clip), "--language-model", str(llama), "--verify")
    step = _import(tmp_path, model, *words)
    assert read_iteration(step) == 0
    assert read_config(step).model == model
    report = capsys.readouterr().out
    pretrained = InitConfig(pretrained_checkpoint=str(tmp_path))
    direct = InitConfig(vision_teacher=str(clip), language_model=str(llama))
    for stage1 in (False, True):
        ours, table = _fill(model, pretrained, stage1=stage1)
        expected, _ = _fill(model, direct, stage1=stage1)
        assert ours.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(ours[name], tensor), name
        if stage1:
            assert re.search(r"post_decoder +18 tensors  dropped: stage 2 only", table)
    new = initial_value("connector.weight", torch.Size((24, 16)), model.init_std, 5)
    assert torch.equal(_fill(model, pretrained)[0]["connector.weight"], new)

    for line in (
        rf"embedding +4 tensors  {clip}",
        rf"embedding +1 tensors  {llama}",
        r"embedding +2 tensors  left out: a run initialises it",
        r"connector +1 tensors  left out: a run initialises it",
        rf"pre_decoder +32 tensors  {clip}",
        rf"lm_head +1 tensors  {llama}",
        rf"text_model +\d+ tensors  skipped: has no counterpart \({clip}\)",
        rf"vision_model +3 tensors  skipped: has no counterpart \({clip}\)",
        rf"--model haplovl-debug .*--pretrained-checkpoint {tmp_path}",
    ):
        assert re.search(line, report), line
    differences = [
        float(x) for x in re.findall(r"of a layer ([\d.e-]+)|of the \w+(?: layer)? ([\d.e-]+)", report) for x in x if x
    ]
    assert len(differences) == 4
    assert 0 < max(differences) < _TOLERANCE


def test_a_folder_left_out_must_come_from_elsewhere(
    tmp_path: Path, clip: Path, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _import(tmp_path, tiny_model(), "--vision-teacher", str(clip))
    assert re.search(r"post_decoder +18 tensors  left out: a run must get it elsewhere", capsys.readouterr().out)
    with pytest.raises(ValueError, match="no weights for .*post_decoder"):
        _fill(tiny_model(), InitConfig(pretrained_checkpoint=str(tmp_path)))
    _fill(tiny_model(), InitConfig(pretrained_checkpoint=str(tmp_path), language_model=str(llama)))


@pytest.mark.parametrize(
    ("build", "changes", "rope"),
    [
        (LlamaForCausalLM, {}, {"rope_type": "default"}),
        (LlamaForCausalLM, {"rope_scaling": RopeScalingConfig("linear", 4.0)}, {"rope_type": "linear", "factor": 4.0}),
        (
            LlamaForCausalLM,
            {"rope_scaling": _LLAMA3},
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        ),
        (Qwen2ForCausalLM, {"qkv_bias": True}, {"rope_type": "default"}),
    ],
    ids=["llama", "linear", "llama3", "qwen2"],
)
def test_every_layer_of_a_language_model(
    tmp_path: Path, build: type, changes: dict[str, object], rope: dict[str, object]
) -> None:
    model = tiny_model(post=dataclasses.replace(tiny_model().post, **changes))
    settings = language_config_of(model, rope_parameters={**rope, "rope_theta": model.post.rope_theta})
    folder = _save(build(settings), tmp_path / "folder")
    step = _import(tmp_path / "out", model, "--language-model", str(folder))
    found = compare_language_model(step, folder)
    assert len(found.layers) == 2
    assert found.largest_value > 1
    assert found.largest_end > 1
    assert max(*found.layers, found.end) < _TOLERANCE
    if "rope_scaling" in changes:
        with pytest.raises(
            SystemExit, match=rf"give --post-rope-scaling-type {rope['rope_type']} --post-rope-scaling-fac"
        ):
            _import(tmp_path / "other", tiny_model(), "--language-model", str(folder))


def test_the_comparison_sees_a_changed_weight(tmp_path: Path, clip: Path, llama: Path) -> None:
    step = _import(tmp_path, tiny_model(), "--vision-teacher", str(clip), "--language-model", str(llama))
    reader = WeightReader(step)
    state = {name: reader.get(name).clone() for name in reader.names()}
    state["pre_decoder.1.mlp.down_proj.bias"][0] += 0.01
    state["post_decoder.0.attention.q_proj.weight"][0, 0] += 0.1
    write_weights(state, step)
    vision, language = compare_vision_tower(step, clip), compare_language_model(step, llama)
    assert vision.layers[0] < _TOLERANCE < vision.layers[1]
    assert language.layers[0] > 10 * _TOLERANCE > _TOLERANCE > language.layers[1]
    assert min(vision.end, language.end) > 10 * _TOLERANCE


@pytest.mark.parametrize("image_size", [12, 4])
def test_another_resolution(tmp_path: Path, clip: Path, image_size: int, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model(vision=dataclasses.replace(tiny_model().vision, image_size=image_size))
    step = _import(tmp_path, model, "--vision-teacher", str(clip))
    cells = image_size // 4
    assert f"{clip}, interpolated (bicubic) from 2 x 2 to {cells} x {cells} cells" in capsys.readouterr().out
    theirs = WeightReader(clip).get("vision_model.embeddings.position_embedding.weight")[1:]
    expected = torch.nn.functional.interpolate(
        theirs.T.reshape(1, 16, 2, 2), size=(cells, cells), mode="bicubic", align_corners=False
    )
    assert torch.equal(WeightReader(step).get("embedding.position"), expected.reshape(16, -1).T)
    # transformers interpolates by itself when it is asked to.
    found = compare_vision_tower(step, clip)
    assert max(*found.layers, found.end) < _TOLERANCE


def test_dtype(tmp_path: Path, llama: Path) -> None:
    step = _import(tmp_path, tiny_model(), "--language-model", str(llama), "--dtype", "bfloat16")
    reader = WeightReader(step)
    stored = reader.get("lm_head.weight")
    assert stored.dtype == torch.bfloat16
    assert torch.equal(stored, WeightReader(llama).get("lm_head.weight").bfloat16())


def test_what_is_refused(tmp_path: Path, clip: Path, llama: Path) -> None:
    save = tmp_path / "out"
    with pytest.raises(SystemExit, match="give --haplo, or --vision-teacher and --language-model"):
        _import(save, tiny_model())
    with pytest.raises(SystemExit, match="hidden_size is 16, but the model has 32; change --pre-hidden-size"):
        _import(
            save,
            tiny_model(pre=dataclasses.replace(tiny_model().pre, hidden_size=32)),
            *("--vision-teacher", str(clip)),
        )
    with pytest.raises(SystemExit, match="--text-embedding folded is the form of a released checkpoint"):
        _import(save, tiny_model(text_embedding="folded"), "--language-model", str(llama))
    reader = WeightReader(llama)
    state = {name: reader.get(name) for name in reader.names()}
    other = tmp_path / "other"
    LlamaForCausalLM.from_pretrained(llama).save_pretrained(other)
    write_weights({**state, "model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(1)}, other)
    with pytest.raises(SystemExit, match=r"has no place for: model\.layers\.0\.self_attn\.q_proj\.lora_A\.weight"):
        _import(save, tiny_model(), "--language-model", str(other))
    settings = json.loads((other / "config.json").read_text())
    settings["rope_parameters"] = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0}
    (other / "config.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit, match="rope_scaling of the type 'yarn' is not supported"):
        _import(save, tiny_model(), "--language-model", str(other))
    assert not save.exists()
    save.mkdir()
    (save / "latest").write_text("global_step7\n")
    with pytest.raises(SystemExit, match="holds the checkpoints of a run"):
        _import(save, tiny_model(), "--language-model", str(llama))


@pytest.fixture(scope="module")
def odd_llama(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """One tensor too many, and one too few."""
    folder = tmp_path_factory.mktemp("odd")
    LlamaForCausalLM.from_pretrained(llama).save_pretrained(folder)
    reader = WeightReader(llama)
    state = {name: reader.get(name) for name in reader.names() if name != "lm_head.weight"}
    write_weights({**state, "model.layers.0.lora_A.weight": torch.zeros(1)}, folder)
    return folder


def test_what_is_missing_or_left_over_can_be_allowed_by_name(
    tmp_path: Path, clip: Path, odd_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--vision-teacher", str(clip), "--language-model", str(odd_llama))
    missing, unexpected = ("--allow-missing", r"lm_head\..*"), ("--allow-unexpected", r".*\.lora_A\..*")
    with pytest.raises(SystemExit, match=r"no tensor 'lm_head.weight'"):
        _import(tmp_path, tiny_model(), *words, *unexpected)
    with pytest.raises(SystemExit, match=r"has no place for: model\.layers\.0\.lora_A\.weight .*--allow-unexpected"):
        _import(tmp_path, tiny_model(), *words, *missing)
    step = _import(tmp_path, tiny_model(), *words, *missing, *unexpected)
    assert "lm_head.weight" not in WeightReader(step)
    report = capsys.readouterr().out
    assert re.search(rf"model +1 tensors  skipped: has no counterpart \({odd_llama}\)", report)
    assert re.search(r"lm_head +1 tensors  left out: a run must get it elsewhere", report)


def test_a_run_starts_without_what_it_was_allowed_to_miss(tmp_path: Path, clip: Path, odd_llama: Path) -> None:
    folders = InitConfig(vision_teacher=str(clip), language_model=str(odd_llama))
    allowed = dataclasses.replace(folders, allow_missing=(r"lm_head\..*",), allow_unexpected=(r".*\.lora_A\..*",))
    with pytest.raises(ValueError, match=r"no tensor 'lm_head\.weight'"):
        _fill(tiny_model(), dataclasses.replace(allowed, allow_missing=("lm_head",)))
    with pytest.raises(ValueError, match="is that of a Hugging Face model"):
        _fill(tiny_model(), InitConfig(pretrained_checkpoint=str(odd_llama)))
    with pytest.raises(ValueError, match=r"lora_A"):
        _fill(tiny_model(), dataclasses.replace(allowed, allow_unexpected=()))
    weights, report = _fill(tiny_model(), allowed)
    assert re.search(r"lm_head +1 tensors  newly initialised", report)
    new = initial_value("lm_head.weight", torch.Size((64, 24)), tiny_model().init_std, 5)
    assert torch.equal(weights["lm_head.weight"], new)
    assert re.search(rf"vision_model +3 tensors  skipped: has no counterpart \({clip}\)", report)

    with pytest.raises(ValueError, match=r"--allow-missing lm_haed: no parameter of this model"):
        _fill(tiny_model(), dataclasses.replace(allowed, allow_missing=(*allowed.allow_missing, "lm_haed")))

    # The same of a training checkpoint.
    step = save_training_checkpoint(
        random_haplovl(tiny_model(image_attention="causal")), Config(model=tiny_model()), tmp_path
    )
    reader = WeightReader(step)
    state = {name: reader.get(name) for name in reader.names() if not name.startswith("connector.")}
    del state["final_norm.weight"]
    write_weights({**state, "adapter.weight": torch.ones(1)}, step)
    start = InitConfig(pretrained_checkpoint=str(tmp_path))
    with pytest.raises(ValueError, match=r"no parameter 'adapter\.weight'.*--allow-unexpected"):
        _fill(tiny_model(), start)
    start = dataclasses.replace(start, allow_unexpected=("adapter.*",))
    with pytest.raises(ValueError, match=r"no weights for final_norm .*--allow-missing"):
        _fill(tiny_model(), start)
    weights, report = _fill(tiny_model(), dataclasses.replace(start, allow_missing=("final_norm.weight",)))
    assert re.search(r"adapter +1 tensors  skipped: --allow-unexpected", report)
    assert re.search(r"final_norm +1 tensors  newly initialised", report)
    assert torch.equal(weights["final_norm.weight"], torch.ones(24))
    assert torch.equal(weights["lm_head.weight"], state["lm_head.weight"])


def test_a_vision_tower_alone(tmp_path: Path) -> None:
    tower = _save(CLIPVisionModel(vision_config_of(tiny_model())), tmp_path / "tower")
    step = _import(tmp_path / "out", tiny_model(), "--vision-teacher", str(tower))
    found = compare_vision_tower(step, tower)
    assert found.largest_value > 1
    assert max(*found.layers, found.end) < _TOLERANCE


@pytest.mark.parametrize("image_size", [8, 12])
@pytest.mark.parametrize("whole", [False, True])
def test_siglip(tmp_path: Path, whole: bool, image_size: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Its differences (no class token, patch bias, other colours, no norm in front) are made up for."""
    pre = dataclasses.replace(tiny_model().pre, activation="gelu_tanh", layernorm_epsilon=1e-6)
    model = tiny_model(pre=pre, vision=dataclasses.replace(tiny_model().vision, image_size=image_size))
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")
    vision = {**{name: getattr(vision_config_of(model), name) for name in names}, "image_size": 8}
    if whole:
        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        network: torch.nn.Module = SiglipModel(SiglipConfig(vision_config=vision, text_config=text))
    else:
        network = SiglipVisionModel(SiglipVisionConfig(**vision))
    folder = _save(network, tmp_path / "siglip")
    step = _import(tmp_path / "out", model, "--vision-teacher", str(folder))
    report = capsys.readouterr().out
    assert re.search(r"embedding +2 tensors .*SigLIP has none: starts at weight 1 and bias 0", report)
    assert ("interpolated" in report) == (image_size != 8)
    assert torch.equal(WeightReader(step).get("embedding.pre_norm.weight"), torch.ones(16))
    found = compare_vision_tower(step, folder)
    assert len(found.layers) == 2
    assert found.largest_value > 1
    assert max(*found.layers, found.end) < _TOLERANCE
    everything_else = ("connector.*", "post_decoder.*", "final_norm.*", "lm_head.*", "embedding.text.*")
    weights, table = _fill(model, InitConfig(vision_teacher=str(folder), allow_missing=everything_else))
    assert "SigLIP has none: starts at weight 1 and bias 0" in table
    for name in WeightReader(step).names():
        assert torch.equal(weights[name], WeightReader(step).get(name)), name
