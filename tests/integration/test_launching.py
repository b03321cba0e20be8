"""Every way to launch trains the same: two "machines", both of them this one, give the losses of a single process.

All go through `examples/ds_try_launch.sh`. Slurm, ssh and pdsh are stand-ins (`tests/fixtures/fake_cluster`); what they
start is DeepSpeed's and torch's own launchers and the real training.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.metrics_files import logged

REPOSITORY = Path(__file__).parents[2]
SCRIPT = ["bash", "examples/ds_try_launch.sh"]
SLURM = ["bash", "examples/slurm/train.sbatch", "examples/ds_try_launch.sh"]
NODES = ("localhost", "127.0.0.1")
FLAGS = ["--device", "cpu", "--train-iters", "3", "--global-batch-size", "4", "--lr", "1e-3"]
LAYOUT = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--pipeline-model-parallel-size", "2"]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def launch(folder: Path, *commands: tuple[list[str], dict[str, str]], ranks: int) -> list[dict]:
    """Start each command with its variables, all at once, as the machines of one run; returns the run's metrics."""
    folder = folder / "a path with spaces"
    folder.mkdir()
    metrics = folder / "metrics.jsonl"
    path = [str(REPOSITORY / "tests" / "fixtures" / "fake_cluster"), str(Path(sys.executable).parent)]
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([*path, os.environ["PATH"]]),
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "MASTER_PORT": free_port(),
    }
    machines, logs = [], [folder / f"{number}.log" for number in range(len(commands))]
    for (words, variables), log in zip(commands, logs, strict=True):
        machines.append(
            subprocess.Popen(
                [*words, "--metrics-file", str(metrics)],
                cwd=REPOSITORY,
                env={**environment, **variables},
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        )
    try:
        codes = [machine.wait(timeout=600) for machine in machines]
    finally:
        for machine in machines:
            if machine.poll() is None:
                os.killpg(machine.pid, signal.SIGKILL)
    output = "".join(log.read_text() for log in logs)
    assert codes == [0] * len(machines), output[-6000:]
    # Two machines that each trained alone would have the same losses, so look at the number of ranks.
    assert output.count("ranks: ") == output.count(f"ranks: {ranks}") == 1, output[-6000:]
    return logged(metrics)


def assert_same_training(metrics: list[dict], expected: list[dict]) -> None:
    assert len(metrics) == len(expected) == 3
    for line, reference in zip(metrics, expected, strict=True):
        for name in ("iteration", "consumed samples", "learning rate"):
            assert line[name] == reference[name]
        for name in ("lm loss", "grad norm"):
            assert line[name] == pytest.approx(reference[name], rel=1e-5), name


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The `deepspeed` launcher with one rank."""
    metrics = launch(
        tmp_path_factory.mktemp("one"), ([*SCRIPT, *FLAGS], {"NUM_GPUS": "1", "LAUNCHER": "deepspeed"}), ranks=1
    )
    assert metrics[0]["lm loss"] != metrics[-1]["lm loss"]
    return metrics


def slurm_job(gpus: str) -> dict[str, str]:
    return {
        "FAKE_NODES": " ".join(NODES),
        "SLURM_JOB_NODELIST": "fake[0-1]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": free_port(),
        "SLURM_CPUS_PER_TASK": "1",
        "NUM_GPUS": gpus,
    }


@pytest.mark.parametrize(
    ("gpus", "flags"), [("1", []), pytest.param("2", LAYOUT, marks=pytest.mark.slow)], ids=["data", "layout"]
)
def test_slurm(tmp_path, one_process, gpus, flags):
    job = ([*SLURM, *FLAGS, *flags], slurm_job(gpus))
    assert_same_training(launch(tmp_path, job, ranks=2 * int(gpus)), one_process)


@pytest.fixture
def hostfile(tmp_path):
    path = tmp_path / "host file"
    path.write_text("".join(f"{node} slots=1\n" for node in NODES))
    return str(path)


@pytest.mark.slow
def test_hostfile(tmp_path, one_process, hostfile):
    run = ([*SCRIPT, *FLAGS], {"HOSTFILE": hostfile, "MASTER_ADDR": "localhost"})
    assert_same_training(launch(tmp_path, run, ranks=2), one_process)


@pytest.mark.slow
def test_hostfile_without_ssh(tmp_path, one_process, hostfile):
    variables = {"HOSTFILE": hostfile, "MASTER_ADDR": "localhost"}
    machines = [([*SCRIPT, *FLAGS], {**variables, "NODE_RANK": rank}) for rank in ("0", "1")]
    assert_same_training(launch(tmp_path, *machines, ranks=2), one_process)
