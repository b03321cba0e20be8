"""The start of a run's processes: device, process group, threads."""

from __future__ import annotations

import errno
import os
import socket
import time
import warnings
from datetime import timedelta

import torch

from megatron_haplovl.config.schema import Config
from megatron_haplovl.engine.flight_recorder import record_collectives
from megatron_haplovl.engine.fresh_store import fresh_store
from megatron_haplovl.parallel.groups import ParallelGroups, build_groups
from megatron_haplovl.parallel.launch import Launch, ranks_on_this_machine
from megatron_haplovl.parallel.launcher_store import connect, launcher_holds_store


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
        os.environ.update(
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            LOCAL_WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(free_port()),
        )
    elif "LOCAL_SIZE" in os.environ:
        settle_port(Launch.of_environment(), 60 * config.parallel.distributed_timeout_minutes)
    # DeepSpeed calls collectives by names that newer torch versions warn about on every rank.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    accelerator = get_accelerator()
    local_rank = int(os.environ["LOCAL_RANK"])
    if accelerator.device_name() == "cpu":
        _share_cores()
        use_no_shared_memory_collectives()
    else:
        accelerator.set_device(local_rank)
        record_collectives(os.environ, config.checkpoint)
    timeout = timedelta(minutes=config.parallel.distributed_timeout_minutes)
    if not torch.distributed.is_initialized():
        backend = "gloo" if accelerator.device_name() == "cpu" else accelerator.communication_backend_name()
        if launcher_holds_store():
            rank, size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
            store = fresh_store(connect(timeout), rank, size, timeout)
            # As DeepSpeed does without a store of ours: torch then splits later groups off this one.
            device = torch.device("cuda", local_rank) if accelerator.device_name() == "cuda" and size > 1 else None
            torch.distributed.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=device
            )
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout)
    groups = build_groups(
        tensor=config.parallel.tensor_model_parallel_size,
        context=config.parallel.context_parallel_size,
        pipeline=config.parallel.pipeline_model_parallel_size,
        timeout=timeout,
    )
    return torch.device(accelerator.device_name(local_rank)), groups


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def settle_port(launch: Launch, patience: float) -> None:
    """Set MASTER_PORT for ranks that `deepspeed` has started: all its runs have the same one, if nobody chooses.

    On one machine rank 0 takes a free port and tells the others by a file; torchrun does so by itself. Several machines
    cannot see one file, so there the port must be free.

    Args:
        launch: whose folder the ranks of this machine share.
        patience: seconds until rank 0 must have chosen.

    Raises:
        ValueError: several machines, and the port is taken.
        TimeoutError: rank 0 has chosen none.
    """
    rank, port = int(os.environ["RANK"]), int(os.environ["MASTER_PORT"])
    if os.environ["LOCAL_SIZE"] != os.environ["WORLD_SIZE"]:
        if rank == 0 and _is_taken(port):
            raise ValueError(
                f"port {port} of {socket.gethostname()} is taken, most often by another run; give another one with "
                "--master_port N to deepspeed, or MASTER_PORT=N to a launch script"
            )
        return
    file = launch.make_folder() / "port"
    if rank == 0:
        aside = file.with_suffix(".new")
        aside.write_text(str(free_port()), encoding="utf-8")
        aside.replace(file)
    end = time.monotonic() + patience
    while not file.exists():
        if time.monotonic() > end:
            raise TimeoutError(f"rank 0 has not said in {patience:.0f} s which port it listens on ({file})")
        time.sleep(0.02)
    os.environ["MASTER_PORT"] = file.read_text(encoding="utf-8")


def _is_taken(port: int) -> bool:
    with socket.socket() as listener:
        # As torch does: what only lingers after a run's end is free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return True
            raise
    return False


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


def use_no_shared_memory_collectives() -> None:
    """Keep DeepSpeed from compiling its collectives for inference on CPUs, which training never calls.

    To be called before the process group is made. They cost a minute or two at the first start, a lock that outlives a
    killed compilation and then stops every later start, and 69 MB of /dev/shm for every rank that is killed.
    """
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False


def _share_cores() -> None:
    """Split the cores among the ranks of this machine, unless the user has decided (OMP_NUM_THREADS)."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_on_this_machine()))
