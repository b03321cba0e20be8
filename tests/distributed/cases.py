"""The configurations that serial and distributed runs are compared on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_haplovl.config.cli import build_config
from megatron_haplovl.config.schema import Config

STEPS = 2

TINY: dict[tuple[str, ...], Any] = {
    ("model", "vocab_size"): 64,
    ("model", "vision", "patch_size"): 8,
    ("model", "vision", "image_size"): 16,
    ("model", "vision", "image_aspect_ratio"): "anyres",
    ("model", "vision", "max_tiles"): 4,
    ("model", "vision", "image_newline"): True,
    ("model", "pre", "num_layers"): 2,
    ("model", "pre", "hidden_size"): 32,
    ("model", "pre", "ffn_hidden_size"): 64,
    ("model", "pre", "num_attention_heads"): 4,
    ("model", "post", "num_layers"): 2,
    ("model", "post", "hidden_size"): 48,
    ("model", "post", "ffn_hidden_size"): 64,
    ("model", "post", "num_attention_heads"): 6,
    ("model", "post", "num_key_value_heads"): 2,
    ("data", "mock_data"): True,
    # This seed and length put several documents and images into some sequences, and a text-only sequence on one rank
    # beside images on the other; `test_zero.py` asserts that.
    ("run", "seed"): 16,
    ("data", "seq_length"): 96,
    ("data", "num_workers"): 0,
    ("schedule", "train_iters"): STEPS,
    ("schedule", "lr_warmup_iters"): 0,
    ("schedule", "lr_decay_style"): "constant",
    ("schedule", "global_batch_size"): 4,
    ("optimizer", "lr"): 1e-3,
    ("optimizer", "weight_decay"): 0.1,
    # Below the norm of the tiny model's gradients, so that clipping is part of the comparison.
    ("optimizer", "clip_grad"): 0.5,
    ("run", "device"): "cpu",
}


def config(recipe: str, **overrides: Any) -> Config:
    """A tiny run of one recipe; overrides name `section__field`."""
    paths = {tuple(name.split("__")): value for name, value in overrides.items()}
    return build_config(
        "pretrain" if recipe == "distill" else "finetune",
        "haplovl-debug",
        {**TINY, ("recipe", "recipe"): recipe, **paths},
    )


def result_file(folder: Path, recipe: str, zero_stage: int, precision: str) -> Path:
    """Where a distributed case leaves its losses and weights."""
    return folder / f"{recipe}-zero{zero_stage}-{precision}.pt"
