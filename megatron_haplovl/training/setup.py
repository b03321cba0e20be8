"""Builds everything that a run needs, in order: processes, model, weights, optimizer, engine, data."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch

from megatron_haplovl.checkpoint.save_load import load_checkpoint
from megatron_haplovl.config.schema import Config, ModelConfig, ParallelConfig
from megatron_haplovl.data.batch import Batch
from megatron_haplovl.data.stream import DataStream, build_stream
from megatron_haplovl.kernels.attention import describe_backend, resolve_backend
from megatron_haplovl.losses.distillation import distillation_loss
from megatron_haplovl.losses.language_modeling import next_token_loss
from megatron_haplovl.losses.terms import DISTILLATION_TERMS, LANGUAGE_MODELING_TERMS, LossTerm
from megatron_haplovl.model.block import Block
from megatron_haplovl.model.haplovl import HaploVL, HaploVLForDistillation
from megatron_haplovl.parallel.groups import DeepSpeedTopology, ParallelGroups, build_groups
from megatron_haplovl.parallel.plan import apply_tensor_parallel, finish_tensor_parallel
from megatron_haplovl.parallel.sequence import apply_context_parallel
from megatron_haplovl.training.deepspeed_config import deepspeed_config
from megatron_haplovl.training.initial_weights import fill_weights
from megatron_haplovl.training.logging import RunLogger
from megatron_haplovl.training.optimizer import ADAMW_NAMES, adamw_implementation, build_optimizer
from megatron_haplovl.training.recipe import apply_recipe, parameter_groups
from megatron_haplovl.training.teacher import VisionTeacher, load_teacher, random_teacher

Sums = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Run:
    """A run that is ready for its first step."""

    config: Config
    engine: Any
    """The DeepSpeed engine."""
    forward: Callable[[Batch], Sums]
    """Micro-batch -> sums of the losses, through the engine."""
    terms: tuple[LossTerm, ...]
    train_data: DataStream
    valid_data: DataStream | None
    first_step: int
    """Optimizer steps already done when the run was resumed."""
    groups: ParallelGroups
    device: torch.device
    logger: RunLogger

    def close(self) -> None:
        """Close the logs and leave the process group."""
        self.logger.close()
        torch.distributed.destroy_process_group()


def setup(config: Config) -> Run:
    """Build a run from its configuration. Called by every rank.

    Raises:
        ValueError: whatever in files or flags keeps the run from starting.
    """
    device, groups = initialize_processes(config)
    logger = RunLogger(config.logging, config.to_dict(), enabled=groups.world.rank == 0)
    adamw = adamw_implementation(config.optimizer, device, offloaded=config.parallel.offload_optimizer == "cpu")
    logger.print(
        f"ranks: {groups.world.size}{_mesh(groups)} | device: {device} | "
        f"precision: {'bf16' if config.precision.bf16 else 'fp32'} | ZeRO stage: {config.parallel.zero_stage} | "
        f"on the host: {_offloaded(config.parallel)} | attention backend: {_attention_backends(config, device)} | "
        f"AdamW: {ADAMW_NAMES[adamw]}"
    )

    stage1 = config.recipe.recipe == "distill"
    teacher = _build_teacher(config, device) if stage1 else None
    model = build_model(config, teacher, groups)
    logger.print(fill_weights(model, config, groups.tensor))
    apply_recipe(model, config.recipe)
    for module in model.modules():
        if isinstance(module, Block):
            module.recompute = config.parallel.recompute_granularity
    if config.precision.compile:
        compile_blocks(model)
    logger.print(_count_parameters(model))
    finish_tensor_parallel(model, groups.tensor, sequence_parallel=config.parallel.sequence_parallel)
    engine = build_engine(model, config, device, groups)

    vocabulary = _vocabulary_shard(config.model, groups)
    if teacher is not None:
        forward: Callable[[Batch], Sums] = partial(
            _forward_stage1, engine, teacher, partial(distillation_loss, **vocabulary)
        )
        terms: tuple[LossTerm, ...] = DISTILLATION_TERMS
    else:
        forward = partial(_forward_stage2, engine, partial(next_token_loss, **vocabulary))
        terms = LANGUAGE_MODELING_TERMS

    build = partial(
        build_stream,
        config=config,
        dp_rank=groups.data.rank,
        dp_size=groups.data.size,
        barrier=groups.world.barrier,
        log=logger.print,
    )
    train_data = build(
        config.data.data_path, num_steps=config.schedule.train_iters, aux_paths=config.data.aux_data_path
    )
    valid_data = None
    if config.data.valid_data_path:
        valid_data = build(config.data.valid_data_path, num_steps=config.logging.eval_iters, shuffle=False)

    first_step = 0
    if config.checkpoint.load is not None:
        first_step = load_checkpoint(engine, config, train_data.plan_key)
        found = f"resumed after step {first_step}" if first_step else "no checkpoint yet, starting from step 0"
        logger.print(f"{config.checkpoint.load}: {found}")
    return Run(config, engine, forward, terms, train_data, valid_data, first_step, groups, device, logger)


def initialize_processes(config: Config) -> tuple[torch.device, ParallelGroups]:
    """Join the process group that `deepspeed` or `torchrun` started; a plain `python` is a group of one."""
    if config.run.device != "auto":
        # Read by DeepSpeed when it is first imported.
        os.environ["DS_ACCELERATOR"] = config.run.device
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            LOCAL_WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    # DeepSpeed calls collectives by names that newer torch versions warn about on every rank.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    accelerator = get_accelerator()
    local_rank = int(os.environ["LOCAL_RANK"])
    if accelerator.device_name() == "cpu":
        _share_cores()
    else:
        accelerator.set_device(local_rank)
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed(
            dist_backend="gloo" if accelerator.device_name() == "cpu" else None,
            auto_mpi_discovery=False,
            timeout=timedelta(minutes=config.parallel.distributed_timeout_minutes),
        )
    groups = build_groups(
        tensor=config.parallel.tensor_model_parallel_size, context=config.parallel.context_parallel_size
    )
    return torch.device(accelerator.device_name(local_rank)), groups


def _share_cores() -> None:
    """Split the cores among the ranks of this machine, unless the user has decided (OMP_NUM_THREADS)."""
    if "OMP_NUM_THREADS" not in os.environ:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))


def _build_teacher(config: Config, device: torch.device) -> VisionTeacher:
    init = config.init
    if init.vision_teacher is None:
        teacher = random_teacher(config.model, init.teacher_layer, config.run.seed)
    else:
        teacher = load_teacher(init.vision_teacher, config.model, init.teacher_layer)
    return teacher.to(device, torch.bfloat16 if config.precision.bf16 else torch.float32)


def build_model(
    config: Config, teacher: VisionTeacher | None, groups: ParallelGroups
) -> HaploVL | HaploVLForDistillation:
    """This rank's part of the module that the recipe trains, not yet filled: with a teacher stage 1's, without one the
    whole model. Split before anything is allocated."""
    with torch.device("meta"):
        backend = config.precision.attention_backend
        if teacher is None:
            model: HaploVL | HaploVLForDistillation = HaploVL(config.model, backend)
        else:
            model = HaploVLForDistillation(config.model, teacher.width, backend)
    # Context parallelism first: of each sequence a rank has a share, and of that share tensor ranks have parts.
    apply_context_parallel(model, groups.context)
    apply_tensor_parallel(model, groups.tensor, sequence_parallel=config.parallel.sequence_parallel)
    return model.to_empty(device="cpu")


def compile_blocks(model: HaploVL | HaploVLForDistillation) -> None:
    """Compile every block in place; parameters keep their names. Attention, already fused, breaks the graph."""
    # Otherwise a block that is compiled too often goes on uncompiled, with a warning only.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for module in model.modules():
        if isinstance(module, Block):
            module.compile()


def build_engine(
    model: HaploVL | HaploVLForDistillation, config: Config, device: torch.device, groups: ParallelGroups
) -> Any:
    """Wrap the model with DeepSpeed: ZeRO, gradient accumulation, clipping, bf16 with fp32 master weights."""
    import deepspeed

    optimizer = build_optimizer(
        parameter_groups(model, config.optimizer),
        config.optimizer,
        device,
        offloaded=config.parallel.offload_optimizer == "cpu",
    )
    if isinstance(model, HaploVLForDistillation) and config.parallel.zero_stage == 3:
        # The head reads the embedding's matrix, so ZeRO-3 must have it whole then, too.
        deepspeed.zero.register_external_parameter(model.distillation, model.embedding.text.weight)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=deepspeed_config(config, groups.data.size),
        mpu=DeepSpeedTopology(groups) if groups.tensor.size > 1 else None,
        dist_init_required=False,
    )
    return engine


def _vocabulary_shard(model: ModelConfig, groups: ParallelGroups) -> dict[str, Any]:
    """Which words this rank's embedding and head hold, as the losses want to be told."""
    if groups.tensor.size == 1:
        return {}
    words = model.vocab_size // groups.tensor.size
    return {
        "group": groups.tensor.process_group,
        "vocab_start": groups.tensor.rank * words,
        "vocab_size": model.vocab_size,
    }


def _forward_stage1(engine: Any, teacher: VisionTeacher, loss_fn: Callable[..., Sums], batch: Batch) -> Sums:
    sums: Sums = engine(batch, teacher(batch), loss_fn)
    return sums


def _forward_stage2(engine: Any, loss_fn: Callable[..., Sums], batch: Batch) -> Sums:
    sums: Sums = engine(batch, loss_fn)
    return sums


def _mesh(groups: ParallelGroups) -> str:
    """How the ranks are arranged, where they are not all data-parallel."""
    if groups.data.size == groups.world.size:
        return ""
    return f" (tensor {groups.tensor.size} x context {groups.context.size} x data {groups.data.size})"


def _offloaded(parallel: ParallelConfig) -> str:
    """What lies in the host's memory instead of the device's."""
    moved = {"optimizer": parallel.offload_optimizer, "parameters": parallel.offload_param}
    return " and ".join(name for name, place in moved.items() if place == "cpu") or "nothing"


def _attention_backends(config: Config, device: torch.device) -> str:
    """What each decoder's attention runs on."""
    dtype = torch.bfloat16 if config.precision.bf16 else torch.float32
    names = []
    for part in (config.model.pre, config.model.post):
        width = part.hidden_size // part.num_attention_heads
        name = resolve_backend(config.precision.attention_backend, device, dtype, width)
        names.append(describe_backend(name, device, dtype, width))
    return names[0] if names[0] == names[1] else f"{names[0]} (pre-decoder), {names[1]} (post-decoder)"


def _count_parameters(model: torch.nn.Module) -> str:
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"parameters: {total:,}, of which {trained:,} are trained"
