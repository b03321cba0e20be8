"""Named models with the paper's sizes.

A preset is a :class:`ModelConfig` and a sequence length. What wins over what is said in `config.cli.combine`.
"""

from __future__ import annotations

from megatron_haplovl.config.schema import ModelConfig, PostDecoderConfig, PreDecoderConfig
from megatron_haplovl.config.vision import VisionConfig

_CLIP_VIT_L = PreDecoderConfig(
    num_layers=24, hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=16, activation="quick_gelu"
)
_VICUNA_7B = PostDecoderConfig(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11008,
    num_attention_heads=32,
    num_key_value_heads=32,
    norm_epsilon=1e-5,
    rope_theta=10000.0,
)
_LLAMA3_8B = PostDecoderConfig(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    norm_epsilon=1e-5,
    rope_theta=500000.0,
)
_QWEN25_7B = PostDecoderConfig(
    num_layers=28,
    hidden_size=3584,
    ffn_hidden_size=18944,
    num_attention_heads=28,
    num_key_value_heads=4,
    norm_epsilon=1e-6,
    rope_theta=1000000.0,
    qkv_bias=True,
)
_FIXED_336 = VisionConfig(patch_size=14, image_size=336, image_aspect_ratio="pad", image_newline=False)


def _any_resolution(max_tiles: int) -> VisionConfig:
    return VisionConfig(
        patch_size=14, image_size=336, image_aspect_ratio="anyres", max_tiles=max_tiles, image_newline=True
    )


# Four tiles of 576 patches are the paper's "up to 2304 tokens" (Sec. 4.2); the released 7B-Pro allows six.
_HAPLOVL_8B = ModelConfig(vocab_size=128256, vision=_any_resolution(4), pre=_CLIP_VIT_L, post=_LLAMA3_8B)

MODELS: dict[str, ModelConfig] = {
    "haplovl-debug": ModelConfig(
        vocab_size=512,
        vision=VisionConfig(patch_size=16, image_size=64, image_aspect_ratio="resize", image_newline=False),
        pre=PreDecoderConfig(num_layers=3, hidden_size=128, ffn_hidden_size=512, num_attention_heads=4),
        post=PostDecoderConfig(
            num_layers=3,
            hidden_size=160,
            ffn_hidden_size=448,
            num_attention_heads=5,
            num_key_value_heads=5,
            rope_theta=10000.0,
        ),
    ),
    "haplovl-7b": ModelConfig(vocab_size=32000, vision=_FIXED_336, pre=_CLIP_VIT_L, post=_VICUNA_7B),
    "haplovl-8b": _HAPLOVL_8B,
    # The same model goes on: how many tiles an image has beside others is a rule for each sample, of every model.
    "haplovl-8b-mi": _HAPLOVL_8B,
    "haplovl-7b-pro": ModelConfig(vocab_size=152064, vision=_any_resolution(6), pre=_CLIP_VIT_L, post=_QWEN25_7B),
}

# Longest packed sequence. 6144 is the paper's context length (Sec. 4.2); 2048 is LLaVA-1.5's.
SEQ_LENGTHS: dict[str, int] = {
    "haplovl-debug": 512,
    "haplovl-7b": 2048,
    "haplovl-8b": 6144,
    "haplovl-8b-mi": 6144,
    "haplovl-7b-pro": 6144,
}
