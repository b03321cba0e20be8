"""Configuration of the released Haplo format: one dictionary per decoder, `base_config` also being the top level."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

# Kind of rope_scaling -> the settings that it needs.
_ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class HaploDecoderConfig:
    """The settings of one decoder, read from its dictionary in config.json. Defaults are the post-decoder's.

    The keys are those of the released format; other keys in the dictionary are kept there and not interpreted.
    """

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    """Epsilon of the blocks' norms, also where they are LayerNorms."""
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    patch_size: int = 14
    norm_mode: str = "rmsnorm"
    """`layernorm` (with bias) or `rmsnorm`."""
    attention_rope: bool = False
    """Whether each attention owns its rotary table; the angles are the same either way."""
    image_token_index: int = 151646
    video_token_index: int = 151647
    image_aspect_ratio: str = "anyres_max_6"
    """`anyres_max_N`, or for one tile per image `pad` or `resize`."""
    image_grid_pinpoints: list[list[int]] | None = None
    """For any resolution: the [height, width] in pixels that a grid of tiles may have."""
    image_newline: bool = True
    default_image_size: int = 336
    image_attention: str = "bidirectional"
    """`causal`: trained without the mixed mask; the authors' package does not know this key."""

    image_token_budget: int | None = None
    """For any resolution: patches that several images of a text share evenly; None gives each of them one tile. The
    authors' package does not know this key."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads")
        if self.norm_mode not in ("layernorm", "rmsnorm"):
            raise ValueError(f"norm_mode {self.norm_mode!r} is neither 'layernorm' nor 'rmsnorm'")
        if self.image_attention not in ("bidirectional", "causal"):
            raise ValueError(f"image_attention {self.image_attention!r} is neither 'bidirectional' nor 'causal'")
        kind = rope_type(self.rope_scaling)
        if kind not in _ROPE_KEYS:
            raise ValueError(f"rope_scaling {self.rope_scaling!r} is not supported, only types 'linear' and 'llama3'")
        if missing := [key for key in _ROPE_KEYS[kind] if key not in (self.rope_scaling or {})]:
            raise ValueError(f"rope_scaling {self.rope_scaling!r} lacks {', '.join(missing)}")
        for name, supported in (("use_sliding_window", False), ("tie_word_embeddings", False)):
            if getattr(self, name) != supported:
                raise ValueError(f"{name} {getattr(self, name)!r} is not supported, only {supported!r}")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HaploDecoderConfig:
        """Read the keys that this class knows.

        Raises:
            ValueError: a setting that this implementation does not support.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


def rope_type(scaling: dict[str, Any] | None) -> str:
    """The kind of a `rope_scaling`, which older files call `type`."""
    if scaling is None:
        return "default"
    return str(scaling.get("rope_type", scaling.get("type", "default")))


_PRE_DEFAULTS: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "hidden_act": "quick_gelu",
    "rms_norm_eps": 1e-5,
    "norm_mode": "layernorm",
    "attention_rope": True,
}
# The base class has a property of this name and would answer an assignment with a warning. It lives in `base_config`
# alone.
_NOT_MIRRORED = ("rope_scaling",)


class HaploConfig(PreTrainedConfig):
    """Configuration of a HaploVL model (`model_type` "haplo").

    Args:
        base_config: settings of the whole model and of the post-decoder. Each is also an attribute of this object.
        pre_config: settings of the pre-decoder.
        post_config: stored, and not used to build layers.
    """

    model_type = "haplo"
    keys_to_ignore_at_inference = ["past_key_values"]

    base_config: dict[str, Any] | None = None
    pre_config: dict[str, Any] | None = None
    post_config: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        base = {**dataclasses.asdict(HaploDecoderConfig()), **(self.base_config or {})}
        # A file may repeat the keys of base_config at its top level; base_config decides.
        super().__post_init__(**{name: value for name, value in kwargs.items() if name not in base})
        self.base_config = base
        self.pre_config = {**dataclasses.asdict(HaploDecoderConfig()), **_PRE_DEFAULTS, **(self.pre_config or {})}
        self.post_config = dict(base) if self.post_config is None else dict(self.post_config)
        for name, value in base.items():
            if name not in _NOT_MIRRORED:
                setattr(self, name, value)

    @property
    def post_decoder(self) -> HaploDecoderConfig:
        """Typed view of `base_config`."""
        return HaploDecoderConfig.from_dict(self._base_values())

    @property
    def pre_decoder(self) -> HaploDecoderConfig:
        """Typed view of `pre_config`."""
        assert self.pre_config is not None
        return HaploDecoderConfig.from_dict(self.pre_config)

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json: the keys of `base_config` stand inside it only, not a second time outside."""
        values: dict[str, Any] = super().to_dict()
        base = self._base_values()
        values = {name: value for name, value in values.items() if name not in base}
        values["base_config"] = base
        return values

    def _base_values(self) -> dict[str, Any]:
        """`base_config`, with the present values of the attributes that mirror it."""
        assert self.base_config is not None
        return {
            name: value if name in _NOT_MIRRORED else getattr(self, name) for name, value in self.base_config.items()
        }
