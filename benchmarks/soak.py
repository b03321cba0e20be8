"""A long run of two ranks with a random fault every so often, which nobody watches: it must end as if nothing had been.

    python benchmarks/soak.py --steps 2000 --every 100 --folder runs/soak --json soak.json

The undisturbed run comes first. Then the same command runs under `examples/common/launch.sh` in a loop that starts it
again on 70 and 75 and stops on everything else, as a scheduler would. The last loss of both must be the same bits. Both
runs read data with a damaged sample, which --skip-bad-samples leaves out. The folder keeps everything, `soak.log` and
the output of each start among it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import machine, write_json
from tests.faults.run import REPOSITORY, TINY, environment
from tests.fixtures.small_prefix import damage_image, write_small_prefix
from tests.processes import kill_tree

RANKS = 2
AGAIN = (70, 75)
"""Exit codes after which the same command is started again."""


def _kill_launcher(script: subprocess.Popen[bytes], save: Path) -> None:
    children = Path(f"/proc/{script.pid}/task/{script.pid}/children").read_text().split()
    for launcher in children[:1]:  # None, if the run ends just now.
        os.kill(int(launcher), signal.SIGKILL)


OUTSIDE: dict[str, Callable[[subprocess.Popen[bytes], Path], None]] = {
    "SIGTERM": lambda script, save: script.send_signal(signal.SIGTERM),
    "SIGUSR1": lambda script, save: script.send_signal(signal.SIGUSR1),
    "launcher killed": _kill_launcher,
    "exit file": lambda script, save: (save / "exit").touch(),
}
"""Faults that come from outside: name -> what is done to the launch script or to --save."""
INSIDE = {
    "kill": "kill",
    "stop": "stop",
    "unknown exception": "unknown_error",
    "loader hang": "hang_read",
    "NaN once": "nan_loss",
    "full disk for one save": "full_disk",
}
"""Faults that a rank inflicts on itself: name -> that in `tests/faults/faults.py`."""
GOES_ON = ("full disk for one save",)
"""Faults that do not end a run."""


@dataclass
class Fault:
    """One fault, and what became of it."""

    name: str
    step: int
    rank: int
    inflicted: float | None = None
    """Seconds since the epoch: when its step began, as far as the metrics tell."""
    over: float | None = None
    """When the run was two steps further: whoever is asked to leave finishes a step or two before."""
    code: int | None = None
    """Exit code; None if the run went on."""
    sentence: str = "the run went on"

    def word(self) -> str:
        """The fault in the form of HAPLOVL_FAULT. A full disk has a number of saves where others have a step."""
        return f"{INSIDE[self.name]}@{1 if self.name in GOES_ON else self.step}:{self.rank}"


def plan(steps: int, every: int, seed: int) -> list[Fault]:
    """A fault at a random step of each interval; every kind comes before one comes again."""
    drawn, faults = random.Random(seed), []
    kinds: list[str] = []
    for start in range(0, steps, every):
        kinds = kinds or drawn.sample([*OUTSIDE, *INSIDE], len(OUTSIDE) + len(INSIDE))
        faults.append(Fault(kinds.pop(), start + drawn.randrange(every // 4, every * 3 // 4), drawn.randrange(RANKS)))
    return faults


def flags(prefix: str, folder: Path, steps: int, save_interval: int) -> list[str]:
    """The training's flags."""
    return [
        *(word for word in TINY if word != "--mock-data"),
        *("--data-path", prefix, "--skip-bad-samples", "1", "--allow-missing", ".*"),
        # So low a rate that the last loss is still one that every earlier step has a part in.
        *("--train-iters", str(steps), "--lr-decay-style", "cosine", "--lr", "1e-5"),
        *("--save", f"{folder}/save", "--load", f"{folder}/save", "--save-interval", str(save_interval)),
        *("--keep-last", "3", "--metrics-file", f"{folder}/metrics.jsonl"),
        # Hangs are short, but a start on a machine that is busy with other things is given its time.
        *("--distributed-timeout-minutes", "5", "--distributed-timeout-seconds-after-init", "60"),
        *("--loader-timeout-seconds", "30"),
    ]


def start(words: Sequence[str], log: TextIO, faults: Sequence[Fault], launcher: str) -> subprocess.Popen[bytes]:
    """Start the launch script."""
    script = 'source examples/common/launch.sh; launch tests/faults/faulty_run.py finetune "$@"'
    return subprocess.Popen(
        ["bash", "-c", script, "soak", *words],
        cwd=REPOSITORY,
        env={
            **environment(HAPLOVL_FAULT=" ".join(fault.word() for fault in faults)),
            "LAUNCHER": launcher,
            "NUM_GPUS": str(RANKS),
            "MAX_RESTARTS": "0",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        },
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def rows(metrics: Path, since: float = 0.0) -> list[dict[str, Any]]:
    """Training lines that were written after a time."""
    if not metrics.exists():
        return []
    lines = [json.loads(line) for line in metrics.read_text().splitlines() if line.endswith("}")]
    return [line for line in lines if "loss" in line and line["time"] >= since]


def upcoming(faults: Sequence[Fault]) -> list[Fault]:
    """The faults of one start: those that do not end it, and the first one that does."""
    left = [fault for fault in faults if fault.inflicted is None]
    ending = next((i for i, fault in enumerate(left) if fault.name not in GOES_ON), len(left) - 1)
    return left[: ending + 1]


def one_start(
    words: Sequence[str], folder: Path, log: TextIO, faults: Sequence[Fault], every: Sequence[Fault], launcher: str
) -> int:
    """Run until the script ends, inflict what comes from outside, and note when each fault began and was over."""
    begun = time.time()
    script = start(words, log, [fault for fault in faults if fault.name in INSIDE], launcher)
    try:
        while script.poll() is None:
            time.sleep(0.2)
            note(folder, faults, every, begun, script)
    finally:
        kill_tree(script)
    note(folder, faults, every, begun, None)
    return script.returncode


def note(
    folder: Path, faults: Sequence[Fault], every: Sequence[Fault], begun: float, script: subprocess.Popen[bytes] | None
) -> None:
    """Look at how far the run is."""
    done = max((row["iteration"] for row in rows(folder / "metrics.jsonl", begun)), default=0)
    for fault in every:
        if fault.inflicted is not None and fault.over is None and done >= fault.step + 2:
            fault.over = time.time()
    for fault in faults:
        if fault.inflicted is None and done >= fault.step - 1:
            fault.inflicted = time.time()
            if fault.name in OUTSIDE and script is not None:
                OUTSIDE[fault.name](script, folder / "save")


def soak(arguments: argparse.Namespace, folder: Path, log: TextIO) -> Iterator[str]:
    """The undisturbed run and the disturbed one; yields what is to be said."""
    prefix = write_small_prefix(folder)
    damage_image(prefix, 3)
    interval = max(2, arguments.every // 5)
    for name in ("undisturbed", "disturbed"):
        (folder / name).mkdir()
    words = flags(prefix, folder / "undisturbed", arguments.steps, interval)
    started = time.time()
    code = one_start(words, folder / "undisturbed", log, [], [], arguments.launcher)
    assert code == 0, f"the undisturbed run ended with {code}; see {log.name}"
    expected = rows(folder / "undisturbed/metrics.jsonl")
    alone = time.time() - started
    yield f"undisturbed: {len(expected)} steps in {alone:.0f} s, last loss {expected[-1]['loss']!r}"

    disturbed, faults = folder / "disturbed", plan(arguments.steps, arguments.every, arguments.seed)
    words = flags(prefix, disturbed, arguments.steps, interval)
    started, starts, code = time.time(), 0, 70
    unplanned: list[str] = []
    while code in AGAIN:
        now = upcoming(faults)
        yield f"start {starts + 1}: " + (", ".join(f"{f.name} at step {f.step}" for f in now) or "no fault is left")
        log.write(f"=== start {starts + 1}\n")
        log.flush()
        begun = time.time()
        code = one_start(words, disturbed, log, now, faults, arguments.launcher)
        starts += 1
        hit = [fault for fault in now if fault.inflicted is not None]
        if code in AGAIN:
            sentence = last_words(disturbed / "save", begun)
            if hit:
                hit[-1].code, hit[-1].sentence = code, sentence
            else:  # A busy machine can be a fault, too. Whoever supervises starts the run again.
                unplanned.append(sentence)
                yield f"start {starts} ended with {code} before any fault of ours: {sentence}"
                assert len(unplanned) <= len(faults), f"the run ends by itself again and again; see {log.name}"
    took = time.time() - started
    yield from table(faults)
    found = rows(disturbed / "metrics.jsonl")
    by_step = {row["iteration"]: row["loss"] for row in found}
    same = by_step == {row["iteration"]: row["loss"] for row in expected} and len(by_step) == len(found)
    yield (
        f"ended with {code} after {starts} starts in {took:.0f} s ({took - alone:.0f} s more than undisturbed); "
        f"{len(unplanned)} of them ended before any fault of ours"
    )
    yield f"last loss {found[-1]['loss']!r}; all {len(expected)} losses, each once and bit for bit: {same}"
    if arguments.json:
        write_json(
            arguments.json,
            [vars(fault) for fault in faults],
            **machine("cpu"),
            arguments={name: str(value) for name, value in vars(arguments).items()},
            undisturbed_seconds=alone,
            disturbed_seconds=took,
            starts=starts,
            unplanned=unplanned,
            code=code,
            same_losses=same,
        )
    if code != 0 or not same or any(fault.inflicted is None for fault in faults):
        raise SystemExit(f"the disturbed run is not as the undisturbed one; see {log.name}")


def last_words(save: Path, begun: float) -> str:
    """What the start that began then ended with. A script whose launcher was killed ends before its ranks have."""
    for _ in range(150):
        found = json.loads((save / "last_words.json").read_text())
        if found["time"] >= begun:
            return str(found["sentence"])
        time.sleep(0.1)
    return "no rank has said why it ended"


def table(faults: Sequence[Fault]) -> Iterator[str]:
    """Each fault, how the run ended, and the time until it was as far again."""
    yield "| fault | step | rank | exit code | seconds lost | sentence |"
    yield "|---|---|---|---|---|---|"
    for fault in faults:
        lost = "" if fault.inflicted is None or fault.over is None else f"{fault.over - fault.inflicted:.0f}"
        code = "" if fault.code is None else fault.code
        sentence = fault.sentence.replace("|", "\\|")
        yield f"| {fault.name} | {fault.step} | {fault.rank} | {code} | {lost} | {sentence} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=100, help="steps for each fault (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--launcher", choices=("torchrun", "deepspeed"), default="torchrun")
    parser.add_argument("--folder", type=Path, required=True, help="new; keeps everything")
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True)
    with (folder / "soak.log").open("w") as log:
        log.write(shlex.join(sys.argv) + "\n")
        log.flush()
        for line in soak(arguments, folder, log):
            log.write(f"{line}\n")
            log.flush()
            print(line, flush=True)


if __name__ == "__main__":
    main()
