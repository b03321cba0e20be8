"""Signals that a rank sends itself, named NAME-PLACE: in a step, in an evaluation, in a save, before the first step."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron_haplovl.data.worker_signals import STOP_SIGNALS
from megatron_haplovl.engine import checkpointing
from megatron_haplovl.training import loop, setup


def _wrap(holder: dict[str, Any] | Any, name: str, before: Callable[..., None]) -> None:
    """Do something before every call of a function."""
    is_class = isinstance(holder, type)
    original = getattr(holder, name) if is_class else holder[name]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before(*args)
        return original(*args, **kwargs)

    if is_class:
        setattr(holder, name, wrapped)
    else:
        holder[name] = wrapped


def _send(number: signal.Signals, place: str, step: int, rank: int) -> None:
    """Arrange for a signal at a step (counted from 1) of a rank.

    Args:
        number: the signal.
        place: start (the step is not looked at), step, evaluate or save.
        step: in whose beginning, or behind which.
        rank: that sends it to itself; -1 for all.
    """
    sent: list[int] = []

    def send(at: int) -> None:
        is_its_turn = at == step and rank in (-1, int(os.environ["RANK"])) and not sent
        if is_its_turn:
            sent.append(at)
            os.kill(os.getpid(), number)

    if place == "step":
        _wrap(vars(loop), "train_step", lambda run, done, micro_batches: send(done + 1))
    elif place == "evaluate":
        _wrap(vars(loop), "evaluate", lambda run, done: send(done))
    elif place == "save":
        _wrap(checkpointing.CheckpointWriter, "save", lambda writer, done, plan_key: send(done))
    else:
        _wrap(vars(setup), "build_engine", lambda *args: send(step))


SIGNAL_FAULTS: dict[str, Callable[[int, int], None]] = {
    f"{number.name}-{place}": partial(_send, number, place)
    for number in STOP_SIGNALS
    for place in ("start", "step", "evaluate", "save")
}
