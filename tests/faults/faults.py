"""Faults that a rank inflicts on itself: name -> function of (step, rank), called before the run is set up."""

from __future__ import annotations

import math
import os
import resource
import signal
import time
from collections.abc import Callable
from typing import Any

import torch

from megatron_haplovl.checkpoint import write
from megatron_haplovl.training import loop
from tests.faults.hang_faults import HANG_FAULTS
from tests.faults.signal_faults import SIGNAL_FAULTS


def at_step(step: int, rank: int, action: Callable[[], None]) -> None:
    """Do something on one rank when it begins an optimizer step (counted from 1)."""
    with_run_at_step(step, rank, lambda _run: action())


def with_run_at_step(step: int, rank: int, action: Callable[[Any], None]) -> None:
    """The same for something that is done to the run."""
    original: Any = vars(loop)["train_step"]

    def wrapped(run: Any, done: int, micro_batches: Any) -> Any:
        if done + 1 == step and int(os.environ["RANK"]) == rank:
            action(run)
        return original(run, done, micro_batches)

    vars(loop)["train_step"] = wrapped


def stop(step: int, rank: int) -> None:
    """The process is stopped, as by a debugger or a machine that swaps."""
    at_step(step, rank, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def kill(step: int, rank: int) -> None:
    """The process is gone without a word, as after the kernel's out-of-memory killer."""
    at_step(step, rank, lambda: os.kill(os.getpid(), signal.SIGKILL))


def unknown_error(step: int, rank: int) -> None:
    """An exception that nobody has foreseen."""

    def fail() -> None:
        raise RuntimeError("an exception that nobody has foreseen")

    at_step(step, rank, fail)


def out_of_memory(step: int, rank: int) -> None:
    """The host's memory is too small."""

    def ask_for_too_much() -> None:
        torch.empty(1 << 50)

    at_step(step, rank, ask_for_too_much)


def truncate(step: int, rank: int) -> None:
    """A file of the data, HAPLOVL_FAULT_FILE, becomes empty."""
    at_step(step, rank, lambda: os.truncate(os.environ["HAPLOVL_FAULT_FILE"], 0))


def _scaled_loss(step: int, rank: int, factor: float) -> None:
    """The loss of one rank's first micro-batch of a step is multiplied whenever it is computed: its samples are bad."""

    def spoil(run: Any) -> None:
        hit = run.train_data.packs(run.train_data.numbers(step - 1)[0]).tokens_BS

        def multiply(_head: Any, inputs: Any, found: dict[str, Any]) -> dict[str, Any]:
            is_hit = torch.equal(inputs[1].tokens_BS.cpu(), hit)
            return {**found, "lm loss": found["lm loss"] * factor} if is_hit else found

        run.model.module.lm_head.register_forward_hook(multiply)

    with_run_at_step(step, rank, spoil)


def nan_loss(step: int, rank: int) -> None:
    """A sample's loss is not a number."""
    _scaled_loss(step, rank, math.nan)


def spike(step: int, rank: int) -> None:
    """A sample's loss is far too large."""
    _scaled_loss(step, rank, 1000.0)


def inf_gradient(step: int, rank: int) -> None:
    """A gradient of this step is not finite, though the loss is; the next step's gradients are."""
    end: list[Any] = []

    def spoil(run: Any) -> None:
        parameter = run.model.module.connector.weight
        end.append(parameter.register_hook(lambda gradient: gradient * math.inf))

    with_run_at_step(step, rank, spoil)
    with_run_at_step(step + 1, rank, lambda _run: end.pop().remove())


def bit_flip(step: int, rank: int) -> None:
    """A bit of a weight is another one than it was."""

    def flip(run: Any) -> None:
        run.model.module.connector.weight.data.view(-1).view(torch.int32)[5] ^= 1 << 3

    with_run_at_step(step, rank, flip)


def full_disk(times: int, rank: int) -> None:
    """The system refuses large files to one rank, the first `times` times that it writes its part of a checkpoint."""
    write_rank, left = write.write_rank, times

    def write_part(*arguments: Any) -> Any:
        nonlocal left
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if int(os.environ["RANK"]) == rank and left > 0:
            left -= 1
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            return write_rank(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    vars(write)["write_rank"] = write_part


def slow_step(step: int, rank: int) -> None:
    """A step takes three seconds more."""
    at_step(step, rank, lambda: time.sleep(3))


def slow_write(seconds: int, rank: int) -> None:
    """One rank's part of a checkpoint takes so many seconds more."""
    write_rank = write.write_rank

    def write_part(*arguments: Any) -> Any:
        if int(os.environ["RANK"]) == rank:
            time.sleep(seconds)
        return write_rank(*arguments)

    vars(write)["write_rank"] = write_part


FAULTS: dict[str, Callable[[int, int], None]] = {
    "bit_flip": bit_flip,
    "full_disk": full_disk,
    "inf_gradient": inf_gradient,
    "kill": kill,
    "nan_loss": nan_loss,
    "out_of_memory": out_of_memory,
    "slow_step": slow_step,
    "slow_write": slow_write,
    "spike": spike,
    "stop": stop,
    "truncate": truncate,
    "unknown_error": unknown_error,
    **SIGNAL_FAULTS,
    **HANG_FAULTS,
}
