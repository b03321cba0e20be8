"""Saving and resuming a run: DeepSpeed's own files, plus weights and settings that anything can read.

SAVE/global_step100/            DeepSpeed's optimizer and engine state
SAVE/global_step100/model.safetensors, config.json
SAVE/global_step100/pipeline_stages.txt   of a pipelined run, what each stage held
SAVE/latest                     "global_step100", written last
SAVE/latest_checkpointed_iteration.txt
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_haplovl.checkpoint.weights import read_config, resolve_checkpoint, write_weights
from megatron_haplovl.config.schema import Config
from megatron_haplovl.parallel.collectives import all_gather
from megatron_haplovl.parallel.plan import split_dim
from megatron_haplovl.parallel.sharded_model import ShardedModel

_STAGES_FILE = "pipeline_stages.txt"


def save_checkpoint(engine: Any, model: ShardedModel, config: Config, iteration: int, plan_key: str) -> Path:
    """Write everything that a resumed run needs. Called by every rank.

    Args:
        engine: the DeepSpeed engine.
        model: what the engine trains.
        config: the run's settings; `config.checkpoint.save` is the folder.
        iteration: optimizer steps done.
        plan_key: the training data's `DataStream.plan_key`; together with the iteration, the position in the data.

    Returns:
        The folder of this checkpoint.
    """
    assert config.checkpoint.save is not None
    root = Path(config.checkpoint.save)
    tag = f"global_step{iteration}"
    state = {
        "iteration": iteration,
        "global_batch_size": config.schedule.global_batch_size,
        "plan_key": plan_key,
    }
    world = model.groups.world
    engine.save_checkpoint(str(root), tag=tag, client_state=state, save_latest=False)
    _write_weights(model, root / tag)
    if world.rank == 0:
        if model.stages is not None:
            _write_text(root / tag / _STAGES_FILE, model.stages.partition)
        _write_text(root / tag / "config.json", json.dumps({**config.to_dict(), "iteration": iteration}, indent=2))
        _write_text(root / "latest_checkpointed_iteration.txt", str(iteration))
        _write_text(root / "latest", tag)
    world.barrier()
    return root / tag


def load_checkpoint(engine: Any, model: ShardedModel, config: Config, plan_key: str) -> int:
    """Resume from the newest checkpoint in `--load`. Called by every rank.

    DeepSpeed unpickles its files, so the folder must come from a source that may run code here. What the optimizer is
    set to (rates, decay, betas, clipping) is taken from the flags, not from the checkpoint.

    Args:
        engine: a fresh DeepSpeed engine.
        model: what the engine trains.
        config: the run's settings; `config.checkpoint.load` is the folder.
        plan_key: the training data's `DataStream.plan_key`.

    Returns:
        Optimizer steps already done; 0 if the folder holds no checkpoint yet.

    Raises:
        ValueError: `latest` names a folder that is missing, the tensor-parallel size or the pipeline's stages have
            changed, or the global batch size or the data has changed, so that the position in the data would be lost.
    """
    assert config.checkpoint.load is not None
    root = Path(config.checkpoint.load)
    if not (root / "latest").is_file():
        return 0
    folder = resolve_checkpoint(root)
    _check_layout(folder, model, config)
    settings = [{k: v for k, v in g.items() if k != "params"} for g in engine.optimizer.param_groups]
    clip_grad = getattr(engine.optimizer, "clip_grad", None)
    path, state = engine.load_checkpoint(str(root), tag=folder.name)
    if path is None:
        raise ValueError(f"{folder}: DeepSpeed found no checkpoint to load here")
    for group, ours in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(ours)
    if clip_grad is not None:
        engine.optimizer.clip_grad = clip_grad
    if state["global_batch_size"] != config.schedule.global_batch_size:
        raise ValueError(
            f"{folder} was saved with --global-batch-size {state['global_batch_size']}, this run has "
            f"{config.schedule.global_batch_size}; the position in the data would be lost, so keep it"
        )
    if state["plan_key"] != plan_key:
        raise ValueError(
            f"{folder} was trained on other data, or on the same in another order; to resume, keep the preprocessed "
            "data, --data-path with its weights, --aux-data-path, --seed, --seq-length, --packing and the image flags; "
            "to start anew from its weights, give it as --pretrained-checkpoint instead of --load"
        )
    return int(state["iteration"])


def _check_layout(folder: Path, model: ShardedModel, config: Config) -> None:
    was = read_config(folder).parallel.tensor_model_parallel_size
    if was != config.parallel.tensor_model_parallel_size:
        raise ValueError(
            f"{folder} was saved with --tensor-model-parallel-size {was}, this run has "
            f"{config.parallel.tensor_model_parallel_size}; resume with the same, or start anew from its weights with "
            "--pretrained-checkpoint"
        )
    stages = _read_partition(folder)
    ours = None if model.stages is None else model.stages.partition
    if stages != ours:
        raise ValueError(
            f"{folder} was saved with {_describe(stages)}, this run has {_describe(ours)}; resume with the same, or "
            "start anew from its weights with --pretrained-checkpoint"
        )


def saved_partition(root: str, stages: int) -> str | None:
    """The explicit `--pipeline-partition` of the newest checkpoint in a --save folder, if it has so many stages."""
    if not (Path(root) / "latest").is_file():
        return None
    partition = _read_partition(resolve_checkpoint(root))
    return partition if partition is not None and len(partition.split(",")) + 1 == stages else None


def _read_partition(folder: Path) -> str | None:
    path = folder / _STAGES_FILE
    return path.read_text().strip() if path.is_file() else None


def _describe(partition: str | None) -> str:
    return "no pipeline" if partition is None else f"--pipeline-partition {partition}"


def _write_weights(model: ShardedModel, folder: Path) -> None:
    """Gather the weights one by one, in which every rank takes part, and write them on one."""
    tensors = full_weights(model)
    if model.groups.world.rank == 0:
        write_weights(tensors, folder)
    else:
        for _ in tensors:
            pass


def full_weights(model: ShardedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter, whole and on the CPU, one at a time. Called by every rank, which must read to the end."""
    import deepspeed

    tensor, pipeline = model.groups.tensor, model.groups.pipeline
    parameters = dict(model.module.named_parameters())
    any_parameter = next(iter(parameters.values()))
    for name, shape in model.shapes.items():
        owner = model.owner(name)
        if owner == pipeline.rank:
            # Outside ZeRO-3 a parameter is in one piece already and this gathers nothing.
            with deepspeed.zero.GatheredParameters([parameters[name]]):
                dim = split_dim(name)
                mine = parameters[name].detach()
                whole = mine.clone() if dim is None or tensor.size == 1 else all_gather(mine, tensor, dim)
        else:
            whole = any_parameter.new_empty(shape)
        if pipeline.size > 1:
            dist.broadcast(whole, src=pipeline.ranks[owner], group=pipeline.process_group)
        yield name, whole.cpu()


def _write_text(path: Path, text: str) -> None:
    """Replace a file at once, so that a reader never sees half of it."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text + "\n")
    aside.replace(path)
