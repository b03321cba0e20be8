"""The runs in which the planner's memory is compared with the measured one."""

from __future__ import annotations

from typing import Any

from megatron_haplovl.config.layout import Layout
from megatron_haplovl.config.schema import Config
from megatron_haplovl.planning.engine_memory import Buckets
from tests.distributed.cases import config

RANKS, MEASURED_STEP = 4, 1
BUCKETS = Buckets(reduce_bucket_size=2**18, stage3_prefetch_bucket_size=2**18)
"""By default DeepSpeed's buffers take as much as hundreds of these models."""

# Large enough that what is not counted (indices, masks, scalars) is little.
_SIZES: dict[str, Any] = {
    "model__vocab_size": 1024,
    "model__vision__patch_size": 8,
    "model__vision__image_size": 32,
    "model__pre__num_layers": 2,
    "model__pre__hidden_size": 128,
    "model__pre__ffn_hidden_size": 512,
    "model__pre__num_attention_heads": 4,
    "model__post__num_layers": 2,
    "model__post__hidden_size": 256,
    "model__post__ffn_hidden_size": 768,
    "model__post__num_attention_heads": 8,
    "model__post__num_key_value_heads": 4,
    "data__seq_length": 512,
}
_PARALLEL: dict[str, dict[str, Any]] = {
    "DP 4": {},
    "TP 2 + SP x DP 2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "TP 4": {"tensor_model_parallel_size": 4},
    "CP 2 x DP 2": {"context_parallel_size": 2},
    "PP 2 x DP 2": {"pipeline_model_parallel_size": 2},
    "PP 4": {"pipeline_model_parallel_size": 4},
    "TP 2 + SP x PP 2": {
        **{"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2},
    },
}
# (ranks, ZeRO stage, precision, recomputation, recipe)
CASES = (
    *(("DP 4", zero, precision, "none", "full") for precision in ("bf16", "fp32") for zero in (0, 1, 2)),
    ("DP 4", 1, "bf16", "full", "full"),
    ("DP 4", 2, "bf16", "selective", "full"),
    ("DP 4", 2, "fp32", "full", "full"),
    *(("TP 2 + SP x DP 2", 1, "bf16", recompute, "full") for recompute in ("none", "full")),
    ("TP 4", 0, "fp32", "none", "full"),
    ("CP 2 x DP 2", 1, "bf16", "selective", "full"),
    ("CP 2 x DP 2", 0, "fp32", "none", "full"),
    *(("PP 2 x DP 2", 1, "bf16", recompute, "full") for recompute in ("none", "full")),
    ("PP 2 x DP 2", 0, "fp32", "none", "full"),
    ("PP 4", 1, "bf16", "none", "full"),
    ("PP 4", 0, "bf16", "none", "full"),
    ("TP 2 + SP x PP 2", 1, "bf16", "none", "full"),
    *(("DP 4", zero, "bf16", "none", "distill") for zero in (0, 1)),
    ("TP 2 + SP x DP 2", 1, "bf16", "none", "distill"),
    ("PP 2 x DP 2", 1, "bf16", "none", "distill"),
    *(("DP 4", 3, precision, "none", "full") for precision in ("bf16", "fp32")),
    ("DP 4", 3, "bf16", "none", "distill"),
)


def memory_config(case: tuple[str, int, str, str, str], deepspeed_json: str | None) -> Config:
    """The run of one case."""
    ranks, zero_stage, precision, recompute, recipe = case
    settings = {f"parallel__{key}": value for key, value in _PARALLEL[ranks].items()}
    return config(
        recipe,
        **_SIZES,
        **settings,
        schedule__global_batch_size=8 if ranks == "DP 4" else 4,
        parallel__zero_stage=zero_stage,
        parallel__recompute_granularity=recompute,
        parallel__deepspeed_config=deepspeed_json,
        precision__bf16=precision == "bf16",
    )


def layout_of(config: Config) -> Layout:
    """The layout of a run, as the planner takes it."""
    parallel = config.parallel
    shared = (
        parallel.tensor_model_parallel_size * parallel.context_parallel_size * parallel.pipeline_model_parallel_size
    )
    return Layout(
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        context=parallel.context_parallel_size,
        data=RANKS // shared,
        zero_stage=parallel.zero_stage,
        sequence_parallel=parallel.sequence_parallel,
        recompute=parallel.recompute_granularity,
        micro_batch_size=config.schedule.micro_batch_size,
    )
