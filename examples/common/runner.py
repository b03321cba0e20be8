"""The command line that the examples share: run the phases that are not done, then show how it ended; or only say so.

An example's script, `recipe.py`, has a `main`, which makes phases from its arguments and hands them to `run_recipe`.
`start` calls it.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from examples.common.phases import Phase, check_phases, is_done, marker_file
from examples.common.scheduler import environment_of, key_of, run_phases


@dataclass(frozen=True)
class Ending:
    """A command that runs after all phases, every time; what it prints is shown."""

    command: Sequence[str | Path]
    lead: str = ""
    """Printed before it."""

    @property
    def words(self) -> list[str]:
        """The words of the command."""
        return [str(word) for word in self.command]


def add_runner_arguments(parser: argparse.ArgumentParser, run: str) -> None:
    """Add --run (with this default), --at-once and --dry-run."""
    parser.add_argument(
        "--run", type=Path, default=Path(run), help="folder that receives everything (default: %(default)s)"
    )
    parser.add_argument(
        "--at-once", type=int, default=2, metavar="N", help="phases that run at the same time, at most (default: 2)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print every command that would be started, and start and write nothing"
    )


def run_recipe(args: argparse.Namespace, phases: Sequence[Phase], endings: Sequence[Ending]) -> int:
    """Run the phases that are not done, then the endings; or print the commands.

    Args:
        args: with the arguments of `add_runner_arguments`.
        phases: a phase stands behind those that it reads.
        endings: commands whose output is the last thing that a user sees.

    Returns:
        The exit status.

    Raises:
        ValueError: see `check_phases`, or --at-once is below 1.
    """
    if args.at_once < 1:
        raise ValueError(f"--at-once must be at least 1, got {args.at_once}")
    if args.dry_run:
        print_commands(phases, endings, args.run)
        return 0
    status = run_phases(phases, args.run, args.at_once)
    for ending in endings:
        if status != 0:
            break
        # What it says of its own progress on stderr comes first, so that lead and answer stay together.
        ended = subprocess.run(ending.words, env=environment_of({}), stdout=subprocess.PIPE, text=True)
        print(ending.lead + ended.stdout, end="", flush=True)
        status = ended.returncode
    return status


def start(main: Callable[[], int]) -> NoReturn:
    """Exit with the status that a script's `main` returns; a user's error is one line on stderr and status 1.

    A signal that ends this process ends what it has started, too.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _exit)
    try:
        status = main()
    except ValueError as error:
        sys.exit(f"error: {error}")
    sys.exit(status)


def print_commands(phases: Sequence[Phase], endings: Sequence[Ending], run: Path) -> None:
    """Print the commands that would be started, in order, as a shell takes them."""
    check_phases(phases, run)
    keys: dict[str, str] = {}
    for phase in phases:
        keys[phase.name] = key_of(phase, keys)
        if is_done(marker_file(run, phase), keys[phase.name]):
            print(f"# {phase.name}: done before, kept")
            continue
        after = f", after {', '.join(earlier.name for earlier in phase.after)}" if phase.after else ""
        print(f"# {phase.name}{after}\n{phase.shell_line()}")
    for ending in endings:
        print(f"# at the end\n{shlex.join(ending.words)}")


def _exit(number: int, _: FrameType | None) -> None:
    """As an exception, so that what runs is ended."""
    sys.exit(128 + number)
