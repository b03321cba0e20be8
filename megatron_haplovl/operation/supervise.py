"""The outermost frame of a run: whatever ends it becomes one sentence and an exit code."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from megatron_haplovl.config.cli import RefusedCommandLine
from megatron_haplovl.config.schema import Config
from megatron_haplovl.data.worker_signals import end_workers
from megatron_haplovl.operation.endings import Ending, ExitCode, RunEnd
from megatron_haplovl.operation.last_words import LastWords
from megatron_haplovl.operation.launcher import Launcher
from megatron_haplovl.operation.lost_peers import cause_of, is_lost_peer
from megatron_haplovl.operation.operation import Operation
from megatron_haplovl.operation.out_of_memory import advice, is_out_of_memory
from megatron_haplovl.operation.signals import StopSignals
from megatron_haplovl.operation.streams import forgive_broken_streams
from megatron_haplovl.operation.watch import Watch
from megatron_haplovl.parallel.launch import Launch

_PACKAGE = Path(__file__).resolve().parents[1]

Parsed = TypeVar("Parsed")


@contextlib.contextmanager
def supervised(config: Config, signals: StopSignals | None = None) -> Iterator[Operation]:
    """Run what follows to its end, whatever that is. It says how it ended by `Operation.ending`, or raises.

    Args:
        config: the run's settings.
        signals: what listens already, if anything does.

    Raises:
        SystemExit: with the code of the ending, unless the run is done.
    """
    launch = Launch.of_environment()
    words = LastWords(launch, Path(config.checkpoint.save) if config.checkpoint.save else None)
    operation = Operation(words=words, signals=signals or StopSignals(launch), began=launch.began)
    assert operation.signals is not None
    operation.signals.may_wait = lambda: operation.steps_done is not None
    operation.signals.at_once = operation.end
    listening = operation.signals
    operation.watch = Watch(
        operation.clock,
        config,
        Launcher(os.environ),
        lambda: listening.received is not None,
        words.guarded,
        operation.end,
    )
    operation.watch.start()
    try:
        try:
            _begin(launch, operation)
            yield operation
        except Exception as error:
            operation.ending = ending_of(error, config, operation)
        if operation.ending is None:
            return
        ending = words.speak(operation.agreed(operation.ending), operation.run_id)
    finally:
        operation.signals.close()
        operation.watch.stop()
        end_workers()
    if ending.code != ExitCode.DONE:
        sys.exit(words.status(ending))


def parsed(parse: Callable[[], Parsed]) -> Parsed:
    """What a command line says. A refused one is the end of the run, so that no launcher starts it again.

    Args:
        parse: reads the command line.

    Raises:
        SystemExit: it is refused, or asks for help.
    """
    forgive_broken_streams()
    try:
        return parse()
    except RefusedCommandLine as refused:
        launch, save = Launch.of_environment(), _save_of(sys.argv)
        if launch.is_scripted or save is not None:
            words = LastWords(launch, save)
            ending = words.speak(Ending(ExitCode.NEEDS_PERSON, refused.sentence, "command line"))
            if launch.is_scripted:
                sys.exit(words.status(ending))
        raise


def _save_of(words: list[str]) -> Path | None:
    """The folder behind --save, in a command line that cannot be read as a whole."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "--save" and following and not following.startswith("--"):
            return Path(following)
        if word.startswith("--save="):
            return Path(word.removeprefix("--save="))
    return None


def _begin(launch: Launch, operation: Operation) -> None:
    """Say that the ranks have started; or end as before, if torchrun has started them again in vain."""
    assert operation.words is not None
    if launch.is_scripted:
        (launch.make_folder() / "begun").touch()
    earlier = operation.words.of_earlier_start()
    if earlier is not None:
        raise RunEnd(earlier.code, earlier.sentence, cause=earlier.cause, step=earlier.step)


def ending_of(error: Exception, config: Config, operation: Operation) -> Ending:
    """What an exception means for the run. Prints its traceback if no check of this package has raised it."""
    if isinstance(error, RunEnd):
        return error.ending
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    if isinstance(error, (ValueError, FloatingPointError)) and raised_in.is_relative_to(_PACKAGE):
        return Ending(ExitCode.NEEDS_PERSON, str(error), type(error).__name__)
    if is_lost_peer(error):
        return cause_of(error, operation)
    traceback.print_exception(error)
    first_line = (str(error).splitlines() or [""])[0]
    if is_out_of_memory(error):
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        return Ending(ExitCode.NEEDS_PERSON, f"{first_line}; {advice(config, ranks)}", "out of memory")
    return Ending(ExitCode.MACHINE_FAULT, f"{type(error).__name__}: {first_line}", type(error).__name__)
