"""The start of a run's processes: device, process group, threads."""

from __future__ import annotations

import os
import socket
import warnings
from datetime import timedelta

import torch

from megatron_haplovl.config.schema import Config
from megatron_haplovl.parallel.groups import ParallelGroups, build_groups


def initialize_processes(config: Config) -> tuple[torch.device, ParallelGroups]:
    """Join the process group that `deepspeed` or `torchrun` started; a plain `python` is a group of one.

    Raises:
        ValueError: srun or mpirun started several processes that know nothing of each other.
    """
    if config.run.device != "auto":
        # DeepSpeed reads this when it is first imported.
        os.environ["DS_ACCELERATOR"] = config.run.device
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if "RANK" not in os.environ:
        check_started_alone()
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
        tensor=config.parallel.tensor_model_parallel_size,
        context=config.parallel.context_parallel_size,
        pipeline=config.parallel.pipeline_model_parallel_size,
        timeout=timedelta(minutes=config.parallel.distributed_timeout_minutes),
    )
    return torch.device(accelerator.device_name(local_rank)), groups


def check_started_alone() -> None:
    """Refuse a process without RANK that was not started alone.

    Several processes that all take themselves for the only one would overwrite one another's checkpoints.

    Raises:
        ValueError: srun, Open MPI, MPICH or Intel MPI say that they started several processes.
    """
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if int(os.environ.get(name, 1)) > 1:
            raise ValueError(
                f"{name}={os.environ[name]}: this process is one of several, but has no RANK; let deepspeed or "
                "torchrun start the training, under Slurm one of them on each machine (docs/launching.md)"
            )


def _share_cores() -> None:
    """Split the cores among the ranks of this machine, unless the user has decided (OMP_NUM_THREADS)."""
    if "OMP_NUM_THREADS" not in os.environ:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
