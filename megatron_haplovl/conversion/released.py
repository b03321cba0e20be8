"""A folder in the released Haplo format as a source of training weights: the inverse of `conversion.export`."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from megatron_haplovl.config.allowed import STRICT, Allowed
from megatron_haplovl.config.cli import flags_to_reach
from megatron_haplovl.config.files import read_json
from megatron_haplovl.config.schema import ModelConfig, PostDecoderConfig, PreDecoderConfig
from megatron_haplovl.config.validate import validate_model
from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.conversion.export import PRE_NORM_EPSILON, is_released
from megatron_haplovl.conversion.hf_compatibility import ACTIVATIONS_FROM_HF, rope_scaling_from_hf
from megatron_haplovl.conversion.hf_sources import MappedWeights, open_haplo
from megatron_haplovl.data.image_geometry import grid_pinpoints
from megatron_haplovl.hf.configuration_haplo import HaploConfig


def open_released(folder: str | Path, model: ModelConfig, allow: Allowed = STRICT) -> tuple[MappedWeights, ModelConfig]:
    """The weights of a released folder, and the model that holds them.

    Args:
        folder: a folder in the released Haplo format.
        model: preset and flags. The text embedding becomes `folded`, and gated blocks and biases are switched on if the
            weights need them; everything else must agree with the folder. The vocabulary may be smaller than the
            folder's if the rows beyond it are zero, as an export pads them.
        allow: what may be missing or left over.

    Raises:
        ValueError: it is no such folder, or its settings, shapes or tensors contradict the model.
    """
    where = Path(folder) / "config.json"
    if not is_released(folder):
        raise ValueError(f"{where}: model_type {read_json(where).get('model_type')!r} is not 'haplo'")
    config = HaploConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    rows = config.post_decoder.vocab_size
    model = dataclasses.replace(model, text_embedding="folded")
    theirs = _described_model(config, model, where)
    if words := flags_to_reach(model, theirs):
        raise ValueError(f"{where}: is another model than the flags describe; give {' '.join(words)}")
    validate_model(theirs)
    return open_haplo(folder, theirs, allow, rows=rows)


def _described_model(config: HaploConfig, model: ModelConfig, where: Path) -> ModelConfig:
    """The model that config.json describes; settings that it does not hold are those of `model`."""
    pre, post = config.pre_decoder, config.post_decoder
    for found, expected, what in (
        (pre.norm_mode, "layernorm", "pre_config's norm_mode"),
        (post.norm_mode, "rmsnorm", "base_config's norm_mode"),
        (post.hidden_act, "silu", "base_config's hidden_act"),
        (pre.rope_scaling, None, "pre_config's rope_scaling"),
        (pre.rms_norm_eps, PRE_NORM_EPSILON, "pre_config's rms_norm_eps"),
        (pre.num_key_value_heads, pre.num_attention_heads, "pre_config's num_key_value_heads"),
    ):
        if found != expected:
            raise ValueError(f"{where}: {what} is {found!r}; the model supports {expected!r} only")
    if pre.hidden_act not in ACTIVATIONS_FROM_HF:
        raise ValueError(
            f"{where}: pre_config's hidden_act {pre.hidden_act!r} is none of {', '.join(ACTIVATIONS_FROM_HF)}"
        )
    if post.vocab_size < model.vocab_size:
        raise ValueError(
            f"{where}: vocab_size is {post.vocab_size}, but the model has {model.vocab_size}; change --vocab-size"
        )
    return dataclasses.replace(
        model,
        image_attention=post.image_attention,
        vision=_described_vision(config, model.vision, where),
        pre=PreDecoderConfig(
            num_layers=pre.num_hidden_layers,
            hidden_size=pre.hidden_size,
            ffn_hidden_size=pre.intermediate_size,
            num_attention_heads=pre.num_attention_heads,
            activation=ACTIVATIONS_FROM_HF[pre.hidden_act],
            layernorm_epsilon=pre.rms_norm_eps,
            rope_theta=pre.rope_theta,
            gated_mlp=model.pre.gated_mlp,
        ),
        post=PostDecoderConfig(
            num_layers=post.num_hidden_layers,
            hidden_size=post.hidden_size,
            ffn_hidden_size=post.intermediate_size,
            num_attention_heads=post.num_attention_heads,
            num_key_value_heads=post.num_key_value_heads,
            norm_epsilon=post.rms_norm_eps,
            rope_theta=post.rope_theta,
            rope_scaling=rope_scaling_from_hf(post.rope_scaling, where),
            qkv_bias=model.post.qkv_bias,
            linear_bias=model.post.linear_bias,
        ),
    )


def _described_vision(config: HaploConfig, vision: VisionConfig, where: Path) -> VisionConfig:
    post = config.post_decoder
    anyres = re.fullmatch(r"anyres_max_(\d+)", post.image_aspect_ratio)
    if anyres is None and post.image_aspect_ratio not in ("pad", "resize"):
        raise ValueError(
            f"{where}: image_aspect_ratio {post.image_aspect_ratio!r} is none of 'pad', 'resize' and 'anyres_max_N'"
        )
    described = VisionConfig(
        patch_size=post.patch_size,
        image_size=post.default_image_size,
        image_aspect_ratio=post.image_aspect_ratio if anyres is None else "anyres",
        max_tiles=vision.max_tiles if anyres is None else int(anyres[1]),
        image_newline=post.image_newline,
        # The authors' folders do not say, and one tile for each is no property of the weights.
        image_token_budget=vision.image_token_budget if post.image_token_budget is None else post.image_token_budget,
    )
    if anyres is not None:
        ours = sorted(list(pinpoint) for pinpoint in grid_pinpoints(described))
        if post.image_grid_pinpoints is not None and sorted(post.image_grid_pinpoints) != ours:
            raise ValueError(
                f"{where}: image_grid_pinpoints are not all grids of at most {described.max_tiles} tiles, as "
                "--max-tiles has them"
            )
    return described
