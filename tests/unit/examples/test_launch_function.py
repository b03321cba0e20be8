"""A launch script passes signals on, says the run's last sentence last, and exits with the run's code."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.fixtures.stand_in_launchers import JOB, LAUNCH_VARIABLES, REPOSITORY

ENDED = """
touch "$HAPLOVL_LAUNCH_DIR/begun"
printf "%s\\n" {code} "the sentence" >"$HAPLOVL_LAUNCH_DIR/ending"
exit {status}
"""


def launcher(folder: Path, body: str) -> dict[str, str]:
    """The environment in which `torchrun` and `deepspeed` are these lines of shell."""
    for name in ("torchrun", "deepspeed"):
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
    cluster = REPOSITORY / "tests" / "fixtures" / "fake_cluster"
    path = os.pathsep.join([str(folder), str(cluster), os.environ["PATH"]])
    return {**kept, "PATH": path, "TMPDIR": str(folder)}


def start(folder: Path, body: str, *command: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command or ("bash", "examples/ds_try_launch.sh"),
        env={**launcher(folder, body), **variables},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("name", ["torchrun", "deepspeed"])
@pytest.mark.parametrize(("code", "status"), [(0, 0), (1, 0), (75, 0), (70, 1), (1, 1)])
def test_the_code_and_the_sentence_are_the_runs(tmp_path, name, code, status):
    body = f"echo noise >&2; {ENDED.format(code=code, status=status)}"
    process = start(tmp_path, body, LAUNCHER=name, HAPLOVL_CODES=str(tmp_path / "codes"))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert errors == "noise\nthe sentence\n"
    assert (tmp_path / "codes").read_text() == f"{code}\n"
    assert list(tmp_path.glob("haplovl-launch*")) == []


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("exit 3", 3, ""),
        ("exit 0", 0, ""),
        ('touch "$HAPLOVL_LAUNCH_DIR/begun"; exit 0', 0, ""),
        ('touch "$HAPLOVL_LAUNCH_DIR/begun"; exit 1', 70, "the ranks ended without a word (exit status 1 of torchrun)"),
    ],
)
def test_without_last_words(tmp_path, body, code, words):
    process = start(tmp_path, body)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert words in errors


# The launcher waits for the name of a signal, as ranks do; a signal to itself would end it.
WAITS = (
    'echo started; while ! [ -s "$HAPLOVL_LAUNCH_DIR/leave" ]; do sleep 0.05; done; cat "$HAPLOVL_LAUNCH_DIR/leave"; '
)


@pytest.mark.parametrize("name", ["torchrun", "deepspeed"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
@pytest.mark.parametrize("to_all", [False, True], ids=["script", "everybody"])
def test_a_signal_is_written_down(tmp_path, number, name, to_all):
    """A terminal and a batch system signal the script's whole process group."""
    with start(tmp_path, WAITS + ENDED.format(code=75, status=0), LAUNCHER=name) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        os.killpg(process.pid, number) if to_all else process.send_signal(number)
        assert process.stdout.read() == f"{signal.Signals(number).name}\n"
    assert process.returncode == 75


def test_the_third_interrupt_asks_nobody(tmp_path):
    with start(tmp_path, 'touch "$HAPLOVL_LAUNCH_DIR/begun"; echo started; sleep 60') as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        assert process.wait(timeout=20) == 70


def test_ranks_know_the_script(tmp_path):
    process = start(tmp_path, 'cat "$HAPLOVL_LAUNCH_DIR/pid"; stat -c %a "$HAPLOVL_LAUNCH_DIR"')
    output, _ = process.communicate(timeout=60)
    assert output.split() == [str(process.pid), "700"]


BATCH = ("bash", "examples/slurm/train.sbatch", "examples/ds_try_launch.sh")


@pytest.mark.parametrize(
    ("codes", "code", "again"),
    [
        ((0, 0), 0, False),
        ((75, 75), 75, True),
        ((70, 70), 70, True),
        ((1, 1), 1, False),
        ((1, 70), 1, False),
        ((75, 70), 75, True),
    ],
)
def test_a_job_is_queued_again_on_75_and_70(tmp_path, codes, code, again):
    meet = 'touch "$TMPDIR/$SLURM_NODEID"; until [ -f "$TMPDIR/0" ] && [ -f "$TMPDIR/1" ]; do sleep 0.05; done'
    body = f"{meet}; codes=({codes[0]} {codes[1]}); {ENDED.format(code='${codes[$SLURM_NODEID]}', status=0)}"
    process = start(tmp_path, body, *BATCH, **JOB)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert ("scontrol: job 1234567 is requeued" in output) == again
    assert list(REPOSITORY.glob("haplovl-*.codes")) == []


@pytest.mark.parametrize(("status", "again"), [(127, False), (2, False), (137, True)])
def test_a_job_whose_ranks_say_nothing(tmp_path, status, again):
    process = start(tmp_path, f"exit {status}", *BATCH, **JOB)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status
    assert ("is requeued" in output) == again


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_that_is_told_to_leave(tmp_path, number):
    """Before the time limit and before a pre-emption."""
    with start(tmp_path, WAITS + ENDED.format(code=75, status=0), *BATCH, **JOB) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["started\n"] * 2
        process.send_signal(number)
        output = process.stdout.read()
    assert process.returncode == 75
    assert output.count(f"{signal.Signals(number).name}\n") >= 2
    assert "is requeued" in output


def test_a_job_asks_for_a_signal_before_its_limit():
    script = (REPOSITORY / "examples" / "slurm" / "train.sbatch").read_text()
    assert "#SBATCH --signal=USR1@600\n#SBATCH --requeue\n" in script


@pytest.mark.parametrize(("rank", "code"), [("0", 1), ("1", 0)])
def test_a_port_that_is_taken_is_said_by_the_machine_that_needs_it(tmp_path, rank, code):
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        several = {"NNODES": "2", "NODE_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        process = start(tmp_path, "exit 0", **several, HAPLOVL_CODES=str(tmp_path / "codes"))
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    said = f"port {port} of {socket.gethostname()} is taken, most often by another run; give another one with MASTER_"
    assert (said in errors) == bool(code)
    assert (tmp_path / "codes").read_text() == f"{code}\n"


def test_a_free_port_is_no_trouble(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    several = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    process = start(tmp_path, "exit 0", **several)
    process.communicate(timeout=60)
    assert process.returncode == 0
