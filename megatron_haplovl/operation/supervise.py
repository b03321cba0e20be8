"""The outermost frame of a run: whatever ends it becomes one sentence and an exit code."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from megatron_haplovl.config.schema import Config
from megatron_haplovl.operation.endings import Ending, ExitCode, RunEnd
from megatron_haplovl.operation.operation import Operation

_PACKAGE = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def supervised(config: Config) -> Iterator[Operation]:
    """Run what follows to its end, whatever that is.

    Args:
        config: the run's settings.

    Raises:
        SystemExit: with the code of the ending.
    """
    try:
        yield Operation()
    except Exception as error:
        finish(ending_of(error, config))


def finish(ending: Ending) -> None:
    """Say how the run has ended, and end the process.

    Raises:
        SystemExit: with the code of the ending, unless the run is done.
    """
    if ending.code == ExitCode.DONE:
        return
    kind = "" if ending.code == ExitCode.COME_BACK else "error: "
    sys.stderr.write(f"{kind}{ending.sentence}\n")
    sys.stderr.flush()
    sys.exit(int(ending.code))


def ending_of(error: Exception, config: Config) -> Ending:
    """What an exception means for the run. Prints its traceback if no check of this package has raised it."""
    if isinstance(error, RunEnd):
        return error.ending
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    if isinstance(error, (ValueError, FloatingPointError)) and raised_in.is_relative_to(_PACKAGE):
        return Ending(ExitCode.NEEDS_PERSON, str(error), type(error).__name__)
    traceback.print_exception(error)
    return Ending(ExitCode.MACHINE_FAULT, f"{type(error).__name__}: {error}", type(error).__name__)
