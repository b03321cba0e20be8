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
    # This seed and length put every kind of document into the first step (text, an image, several images, a video, an
    # image and a video), and a text-only sequence on one rank beside images on the other; `test_zero.py` asserts that.
    ("run", "seed"): 128,
    ("data", "seq_length"): 96,
    ("data", "num_workers"): 0,
    ("schedule", "train_iters"): STEPS,
    ("schedule", "lr_warmup_iters"): 0,
    ("schedule", "lr_decay_style"): "constant",
    ("schedule", "global_batch_size"): 4,
    ("optimizer", "lr"): 1e-3,
    ("optimizer", "weight_decay"): 0.1,
    # With an offloaded optimizer, auto is DeepSpeed's, which takes over a minute to compile.
    ("optimizer", "adamw_implementation"): "torch",
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


def result_file(folder: Path, recipe: str, zero_stage: int, mode: str) -> Path:
    """Where a distributed case leaves its losses and weights; a mode is one of worker_zero.py's."""
    return folder / f"{recipe}-zero{zero_stage}-{mode}.pt"


# Heads that four ranks can share.
SHARED_HEADS: dict[str, Any] = {
    "model__post__hidden_size": 64,
    "model__post__num_attention_heads": 8,
    "model__post__num_key_value_heads": 4,
}
_OFFLOADED: dict[str, dict[str, Any]] = {
    "selective, DP 4, ZeRO 1": {"zero_stage": 1, "recompute_granularity": "selective"},
    "PP 2 x DP 2, ZeRO 1": {"pipeline_model_parallel_size": 2, "zero_stage": 1},
    "TP 2 x CP 2, ZeRO 1": {"tensor_model_parallel_size": 2, "context_parallel_size": 2, "zero_stage": 1},
    "TP 2 x DP 2, ZeRO 2": {"tensor_model_parallel_size": 2, "zero_stage": 2},
    "TP 2 + SP x DP 2, ZeRO 3": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "zero_stage": 3},
}
# Name -> (ranks, settings). With fewer ranks for tensor and context than there are, the rest is data-parallel.
PARALLEL_LAYOUTS: dict[str, dict[str, Any]] = {
    **{f"TP 2 x DP 2, ZeRO {z}": {"tensor_model_parallel_size": 2, "zero_stage": z} for z in (0, 1, 2, 3)},
    **{f"DP 4, ZeRO {z}": {"zero_stage": z} for z in (0, 1, 2)},
    "TP 4": {"tensor_model_parallel_size": 4, "zero_stage": 0},
    "TP 2 + SP x DP 2, ZeRO 1": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "zero_stage": 1},
    "TP 4 + SP, ZeRO 3": {"tensor_model_parallel_size": 4, "sequence_parallel": True, "zero_stage": 3},
    **{f"CP 2 x DP 2, ZeRO {z}": {"context_parallel_size": 2, "zero_stage": z} for z in (0, 3)},
    "CP 4, ZeRO 1": {"context_parallel_size": 4, "zero_stage": 1},
    "TP 2 x CP 2, ZeRO 2": {"tensor_model_parallel_size": 2, "context_parallel_size": 2, "zero_stage": 2},
    "selective, TP 2 x DP 2, ZeRO 2": {
        **{"tensor_model_parallel_size": 2, "zero_stage": 2},
        "recompute_granularity": "selective",
    },
    "full, TP 2 + SP x CP 2, ZeRO 1": {
        **{"tensor_model_parallel_size": 2, "context_parallel_size": 2, "sequence_parallel": True},
        **{"zero_stage": 1, "recompute_granularity": "full"},
    },
    "full, DP 4, ZeRO 3": {"zero_stage": 3, "recompute_granularity": "full"},
    "TP 2 + SP x CP 2, ZeRO 1": {
        **{"tensor_model_parallel_size": 2, "context_parallel_size": 2, "sequence_parallel": True},
        "zero_stage": 1,
    },
    "selective, TP 2 + SP x DP 2, ZeRO 0": {
        **{"tensor_model_parallel_size": 2, "sequence_parallel": True, "zero_stage": 0},
        "recompute_granularity": "selective",
    },
    "TP 4 + SP, ZeRO 2": {"tensor_model_parallel_size": 4, "sequence_parallel": True, "zero_stage": 2},
    "PP 2 x DP 2, ZeRO 0": {"pipeline_model_parallel_size": 2, "zero_stage": 0},
    "PP 2 x DP 2, ZeRO 1": {"pipeline_model_parallel_size": 2, "zero_stage": 1},
    "PP 4, ZeRO 1": {"pipeline_model_parallel_size": 4, "zero_stage": 1, "pipeline_partition": "a cut of each kind"},
    "PP 4 uniform, ZeRO 0": {"pipeline_model_parallel_size": 4, "zero_stage": 0, "pipeline_partition": "uniform"},
    "TP 2 x PP 2, ZeRO 0": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "zero_stage": 0},
    "TP 2 + SP x PP 2, ZeRO 1": {
        **{"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2},
        **{"zero_stage": 1, "pipeline_partition": "parameters"},
    },
    "CP 2 x PP 2, ZeRO 1": {"context_parallel_size": 2, "pipeline_model_parallel_size": 2, "zero_stage": 1},
    # Two sequences per micro-batch, and a first stage that ends in a view on part of each.
    "CP 2 x PP 2, ZeRO 1, micro-batch 2": {
        **{"context_parallel_size": 2, "pipeline_model_parallel_size": 2, "zero_stage": 1},
        **{"pipeline_partition": "pre_decoder.0", "micro_batch_size": 2},
    },
    "full, PP 2 x DP 2, ZeRO 1": {
        **{"pipeline_model_parallel_size": 2, "zero_stage": 1},
        "recompute_granularity": "full",
    },
    **{f"optimizer on the host, {name}": {**layout, "offload_optimizer": "cpu"} for name, layout in _OFFLOADED.items()},
    "parameters on the host, full, TP 4 + SP, ZeRO 3": {
        **{"tensor_model_parallel_size": 4, "sequence_parallel": True},
        **{"offload_param": "cpu", "zero_stage": 3, "recompute_granularity": "full"},
    },
    "optimizer and parameters on the host, CP 2 x DP 2, ZeRO 3": {
        **{"context_parallel_size": 2, "zero_stage": 3},
        **{"offload_optimizer": "cpu", "offload_param": "cpu"},
    },
}
PARALLEL_RANKS = 4
# The layouts above that are run in bf16, too.
BF16_LAYOUTS = (
    *("TP 2 + SP x DP 2, ZeRO 1", "CP 2 x DP 2, ZeRO 3", "PP 2 x DP 2, ZeRO 0", "PP 4, ZeRO 1"),
    *("TP 2 + SP x PP 2, ZeRO 1", "optimizer on the host, PP 2 x DP 2, ZeRO 1"),
)
# As PARALLEL_LAYOUTS, on eight ranks.
LARGE_LAYOUTS: dict[str, dict[str, Any]] = {
    "TP 2 x PP 2 x DP 2, ZeRO 1": {
        **{"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "zero_stage": 1},
    },
    "TP 2 + SP x PP 2 x CP 2, ZeRO 1": {
        **{"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2},
        **{"context_parallel_size": 2, "zero_stage": 1},
    },
    "PP 4 x DP 2, ZeRO 0": {
        **{"pipeline_model_parallel_size": 4, "zero_stage": 0, "pipeline_partition": "a cut of each kind"},
    },
    # One stage is a single norm, so one of its two tensor-parallel ranks has nothing of its own.
    "TP 2 x PP 4, ZeRO 1": {
        **{"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 4, "zero_stage": 1},
        "pipeline_partition": "a stage of one norm",
    },
    "TP 2 x CP 2 x DP 2, ZeRO 3": {
        **{"tensor_model_parallel_size": 2, "context_parallel_size": 2, "zero_stage": 3},
    },
}
LARGE_RANKS = 8
# Those of PARALLEL_LAYOUTS that also run the recipe that trains the connector only.
ALIGN_LAYOUTS = ("TP 2 + SP x DP 2, ZeRO 1", "TP 2 x CP 2, ZeRO 2", "optimizer on the host, TP 2 + SP x DP 2, ZeRO 3")
# Those that also run with --compile.
COMPILED_LAYOUTS = ("DP 4, ZeRO 0", "DP 4, ZeRO 1", "DP 4, ZeRO 2")
# Those that also run with the blocks of a released checkpoint: gated in the pre-decoder, biased everywhere.
RELEASED_LAYOUTS = ("TP 2 + SP x DP 2, ZeRO 1", "TP 2 x PP 2, ZeRO 0")
RELEASED_BLOCKS = {"model__pre__gated_mlp": True, "model__post__qkv_bias": True, "model__post__linear_bias": True}
# Those that also run with a batch counted in samples: an odd number of them, so that some micro-batches are empty.
SAMPLES_LAYOUTS = (
    *("DP 4, ZeRO 2", "full, DP 4, ZeRO 3", "TP 2 + SP x DP 2, ZeRO 1", "TP 2 + SP x CP 2, ZeRO 1"),
    *("CP 2 x DP 2, ZeRO 3", "PP 2 x DP 2, ZeRO 1", "CP 2 x PP 2, ZeRO 1, micro-batch 2"),
)
IN_SAMPLES = {"schedule__batch_unit": "samples", "schedule__global_batch_size": 7}
# (kind of cut, recipe) -> --pipeline-partition. Stage 1 has one decoder, and ends without a norm.
CUTS = {
    ("a cut of each kind", "full"): "pre_decoder.1,connector,post_decoder.1",
    ("a stage of one norm", "full"): "pre_decoder.1,final_norm,lm_head",
    ("a cut of each kind", "distill"): "pre_decoder.0,pre_decoder.1,distillation",
    ("a stage of one norm", "distill"): "pre_decoder.0,pre_decoder.1,distillation",
}


def parallel_case(recipe: str, layout: str) -> str:
    """Name of a case, in the form that rank programs get."""
    return f"{recipe}: {layout}"


def parallel_config(case: str, adamw: str) -> Config:
    """A tiny run with one --adamw-implementation.

    Args:
        case: see :func:`parallel_case`; before the layout there may be "bf16 ", "compiled ", "released " or "samples ".
        adamw: the implementation.
    """
    recipe, _, layout = case.partition(": ")
    name = layout
    for kind in ("bf16 ", "compiled ", "released ", "samples "):
        name = name.removeprefix(kind)
    values = {**PARALLEL_LAYOUTS, **LARGE_LAYOUTS}[name]
    settings: dict[str, Any] = {f"parallel__{key}": value for key, value in values.items() if key != "micro_batch_size"}
    settings["schedule__micro_batch_size"] = values.get("micro_batch_size", 1)
    settings |= {"precision__bf16": layout.startswith("bf16 "), "precision__compile": layout.startswith("compiled ")}
    settings["optimizer__adamw_implementation"] = adamw
    settings |= RELEASED_BLOCKS if layout.startswith("released ") else {}
    settings |= IN_SAMPLES if layout.startswith("samples ") else {}
    kind = settings.get("parallel__pipeline_partition", "auto")
    settings["parallel__pipeline_partition"] = CUTS.get((kind, recipe), kind)
    return config(recipe, **SHARED_HEADS, **settings)
