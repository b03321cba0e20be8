"""Whether a folder's config.json describes the model of the flags.

Our settings are compared with those of CLIP, SigLIP, Llama and Qwen2.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, PretrainedConfig, Qwen2Config

from megatron_haplovl.config.schema import ModelConfig, RopeScalingConfig
from megatron_haplovl.config.stages import StageSpec

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
"""Our name of an activation -> Hugging Face's."""
ACTIVATIONS_FROM_HF = {theirs: ours for ours, theirs in ACTIVATIONS.items()}


def read_hf_config(folder: str | Path) -> PretrainedConfig:
    """The configuration of a Hugging Face folder, with the library's defaults for keys that config.json leaves out.

    Raises:
        ValueError: there is no such folder or no config.json in it. Nothing is ever downloaded.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: has no config.json, so it is not a Hugging Face model folder")
    config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return config


def check_vision_config(config: PretrainedConfig, model: ModelConfig, where: Path) -> None:
    """Compare a vision tower's configuration with the pre-decoder and the patch embedding.

    The image size may differ: the position embedding is interpolated.

    Args:
        config: the vision half's configuration.
        model: the model that it must fit.
        where: the file that it was read from.

    Raises:
        ValueError: a setting differs; the message names the flag.
    """
    if config.num_channels != 3:
        raise ValueError(f"{where}: num_channels is {config.num_channels}; images here have 3")
    pre, vision = model.pre, model.vision
    _check(config.hidden_size, pre.hidden_size, "hidden_size", "--pre-hidden-size", where)
    _check(config.intermediate_size, pre.ffn_hidden_size, "intermediate_size", "--pre-ffn-hidden-size", where)
    _check(config.num_hidden_layers, pre.num_layers, "num_hidden_layers", "--pre-num-layers", where)
    _check(
        config.num_attention_heads, pre.num_attention_heads, "num_attention_heads", "--pre-num-attention-heads", where
    )
    _check(
        ACTIVATIONS_FROM_HF.get(config.hidden_act, config.hidden_act),
        pre.activation,
        "hidden_act",
        "--pre-activation",
        where,
    )
    _check(config.layer_norm_eps, pre.layernorm_epsilon, "layer_norm_eps", "--pre-layernorm-epsilon", where)
    _check(config.patch_size, vision.patch_size, "patch_size", "--patch-size", where)


def check_language_config(config: PretrainedConfig, model: ModelConfig, where: Path, *, stage: StageSpec) -> None:
    """Compare a Llama or Qwen2 configuration with the text embedding and (if the stage has one) the post-decoder.

    Raises:
        ValueError: it is no such model, a setting differs (the message names the flag), or the model has a part that
            the post-decoder lacks.
    """
    if config.model_type not in ("llama", "qwen2"):
        raise ValueError(f"{where}: model_type {config.model_type!r} is neither 'llama' nor 'qwen2'")
    post = model.post
    _check(config.vocab_size, model.vocab_size, "vocab_size", "--vocab-size", where)
    _check(config.hidden_size, post.hidden_size, "hidden_size", "--post-hidden-size", where)
    if "post_decoder" not in stage.layers:
        return
    heads = config.num_attention_heads
    rope = config.rope_parameters
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    _check(config.intermediate_size, post.ffn_hidden_size, "intermediate_size", "--post-ffn-hidden-size", where)
    _check(config.num_hidden_layers, post.num_layers, "num_hidden_layers", "--post-num-layers", where)
    _check(heads, post.num_attention_heads, "num_attention_heads", "--post-num-attention-heads", where)
    _check(
        config.num_key_value_heads or heads,
        post.num_key_value_heads,
        "num_key_value_heads",
        "--post-num-key-value-heads",
        where,
    )
    _check(config.rms_norm_eps, post.norm_epsilon, "rms_norm_eps", "--post-norm-epsilon", where)
    _check(rope["rope_theta"], post.rope_theta, "rope_theta", "--post-rope-theta", where)
    check_rope_scaling(rope, post.rope_scaling, where)
    _check(config.model_type == "qwen2", post.qkv_bias, "q/k/v bias", "--[no-]post-qkv-bias", where)
    if post.linear_bias:
        raise ValueError(f"{where}: has no biases on o, gate, up and down projections; leave out --post-linear-bias")
    for found, expected, what in (
        (head_dim, config.hidden_size // heads, "head_dim (hidden_size / num_attention_heads)"),
        (config.hidden_act, "silu", "hidden_act"),
        (getattr(config, "attention_bias", False), False, "attention_bias"),
        (getattr(config, "mlp_bias", False), False, "mlp_bias"),
        (getattr(config, "use_sliding_window", False), False, "use_sliding_window"),
    ):
        if found != expected:
            raise ValueError(f"{where}: {what} is {found!r}; the post-decoder supports {expected!r} only")


def vision_config_of(model: ModelConfig) -> CLIPVisionConfig:
    """The CLIP whose weights the pre-decoder and the patch embedding take over."""
    pre, vision = model.pre, model.vision
    return CLIPVisionConfig(
        hidden_size=pre.hidden_size,
        intermediate_size=pre.ffn_hidden_size,
        num_hidden_layers=pre.num_layers,
        num_attention_heads=pre.num_attention_heads,
        hidden_act=ACTIVATIONS[pre.activation],
        layer_norm_eps=pre.layernorm_epsilon,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
    )


def language_config_of(model: ModelConfig, **changes: Any) -> LlamaConfig | Qwen2Config:
    """The Llama (with biases of q, k and v: the Qwen2) whose weights text embedding and post-decoder take over.

    Args:
        model: sizes.
        **changes: settings of the configuration to add or to replace.
    """
    post = model.post
    settings: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "hidden_size": post.hidden_size,
        "intermediate_size": post.ffn_hidden_size,
        "num_hidden_layers": post.num_layers,
        "num_attention_heads": post.num_attention_heads,
        "num_key_value_heads": post.num_key_value_heads,
        "rms_norm_eps": post.norm_epsilon,
        "rope_parameters": {
            "rope_theta": post.rope_theta,
            **(rope_scaling_to_hf(post.rope_scaling) or {"rope_type": "default"}),
        },
        "tie_word_embeddings": False,
    }
    return (Qwen2Config if post.qkv_bias else LlamaConfig)(**{**settings, **changes})


def _check(theirs: Any, ours: Any, name: str, flag: str, where: Path) -> None:
    if theirs != ours:
        raise ValueError(f"{where}: {name} is {theirs!r}, but the model has {ours!r}; change {flag} or the folder")


# Our field -> Hugging Face's key, for both kinds of scaling.
_ROPE_KEYS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_positions": "original_max_position_embeddings",
}
_ROPE_FIELDS = {
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_positions"),
}


def rope_scaling_from_hf(settings: Mapping[str, Any] | None, where: Path) -> RopeScalingConfig:
    """Our form of Hugging Face's `rope_scaling` or `rope_parameters`.

    Raises:
        ValueError: a kind of scaling, or a setting of one, that the model cannot compute.
    """
    values = dict(settings or {})
    values.pop("rope_theta", None)
    old_name = values.pop("type", None)
    kind = values.pop("rope_type", old_name) or "default"
    kind = "none" if kind == "default" else kind
    if kind not in _ROPE_FIELDS:
        raise ValueError(f"{where}: rope_scaling of the type {kind!r} is not supported, only 'linear' and 'llama3'")
    ours = {name: values.pop(_ROPE_KEYS[name], None) for name in _ROPE_FIELDS[kind]}
    if missing := [_ROPE_KEYS[name] for name, value in ours.items() if value is None]:
        raise ValueError(f"{where}: rope_scaling of the type {kind!r} lacks {', '.join(missing)}")
    if unknown := {name: value for name, value in values.items() if value is not None}:
        raise ValueError(f"{where}: rope_scaling has settings that are not supported: {unknown}")
    return RopeScalingConfig(kind, **ours)


def rope_scaling_to_hf(scaling: RopeScalingConfig) -> dict[str, Any] | None:
    """The value of the key `rope_scaling` in config.json."""
    if scaling.type == "none":
        return None
    values = {_ROPE_KEYS[name]: getattr(scaling, name) for name in _ROPE_FIELDS[scaling.type]}
    return {"rope_type": scaling.type, **values}


def check_rope_scaling(settings: Mapping[str, Any] | None, ours: RopeScalingConfig, where: Path) -> None:
    """Compare Hugging Face's `rope_scaling` or `rope_parameters` with the post-decoder's.

    Raises:
        ValueError: they differ; the message has the flags to set.
    """
    theirs = rope_scaling_from_hf(settings, where)
    if theirs != ours:
        values = {name: getattr(theirs, name) for name in ("type", *_ROPE_FIELDS[theirs.type])}
        flags = " ".join(f"--post-rope-scaling-{name.replace('_', '-')} {value}" for name, value in values.items())
        raise ValueError(f"{where}: rope_scaling differs from the model's ({ours.type}); give {flags}")
