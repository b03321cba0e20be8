"""An error that only says that another rank has gone: the cause lies with that one."""

from __future__ import annotations

import time
import traceback

import torch

from megatron_haplovl.operation.endings import Ending, ExitCode
from megatron_haplovl.operation.last_words import LOST_PEER
from megatron_haplovl.operation.operation import Operation

_SECONDS_TO_WAIT = 5.0
_SECONDS_BETWEEN_LOOKS = 0.1
_WORDS = ("gloo/", "closed by peer", "reset by peer", "Broken pipe", "NCCL", "ProcessGroup")
"""Parts of what torch's backends say when a peer is gone or does not answer in time."""


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error of torch's communication says that another rank is gone or does not answer."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def cause_of(error: BaseException, operation: Operation) -> Ending:
    """The ending behind a lost peer: what another rank said, who is gone, or only that somebody is.

    Args:
        error: see :func:`is_lost_peer`.
        operation: who is asked.
    """
    end = time.monotonic() + _SECONDS_TO_WAIT
    while time.monotonic() < end:
        known = operation.found_ending()
        if known is not None:
            return known
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    gone = None if operation.watch is None else operation.watch.who_is_gone()
    if gone is not None:
        return Ending(ExitCode.MACHINE_FAULT, gone, "a rank is gone")
    traceback.print_exception(error)
    first_line = (str(error).splitlines() or [""])[0]
    sentence = f"another rank is gone or does not answer ({type(error).__name__}: {first_line})"
    return Ending(ExitCode.MACHINE_FAULT, sentence, LOST_PEER)
