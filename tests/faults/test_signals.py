"""A signal: the step is finished and saved, all ranks leave together, and no step is trained twice."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from megatron_haplovl.data.worker_signals import STOP_SIGNALS
from tests.faults.run import TINY, command, losses, run_to_end, started, wait_for

STEPS = 6
_QUICK = {("torchrun", "SIGTERM"), ("deepspeed", "SIGUSR1")}
NAMES = [number.name for number in STOP_SIGNALS]


def flags(folder: Path, *more: str) -> list[str]:
    kept = ["--save", str(folder / "save"), "--load", str(folder / "save")]
    return ["--train-iters", str(STEPS), *kept, "--metrics-file", str(folder / "metrics.jsonl"), *more]


def iterations(metrics: Path) -> list[int]:
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [row["iteration"] for row in rows if "loss" in row]


def last_words(folder: Path) -> dict:
    return json.loads((folder / "save" / "last_words.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = run_to_end(command("deepspeed", 2, "finetune", flags(folder)), folder / "log")
    assert ended.code == 0, ended.output[-3000:]
    assert last_words(folder)["code"] == 0
    return losses(folder / "metrics.jsonl")


def check_resumed(folder: Path, undisturbed: dict[int, float], left_after: int, launcher: str = "deepspeed") -> None:
    assert last_words(folder)["step"] == left_after
    assert iterations(folder / "metrics.jsonl") == list(range(1, left_after + 1))
    ended = run_to_end(command(launcher, 2, "finetune", flags(folder)), folder / "resumed.log")
    assert ended.code == 0, ended.output[-3000:]
    assert iterations(folder / "metrics.jsonl") == list(range(1, STEPS + 1))
    assert losses(folder / "metrics.jsonl") == undisturbed


@pytest.mark.parametrize(
    ("launcher", "name"),
    [
        pytest.param(launcher, name, marks=[] if (launcher, name) in _QUICK else pytest.mark.slow)
        for launcher in ("torchrun", "deepspeed")
        for name in NAMES
    ],
)
def test_one_rank_gets_a_signal_in_a_step(tmp_path, undisturbed, launcher, name):
    words = command(launcher, 2, "finetune", flags(tmp_path, "--num-workers", "1"))
    ended = run_to_end(words, tmp_path / "log", HAPLOVL_FAULT=f"{name}-step@3:1")
    sentence = f"left after step 3 of {STEPS}: {name}; everything is saved"
    # torchrun makes 1 of every code, and shows the sentence in its summary.
    assert ended.code == (75 if launcher == "deepspeed" else 1), ended.output[-3000:]
    assert ended.output.count(f"\n{sentence}\n") == 1, ended.output[-3000:]
    assert (f"traceback : {sentence}" in ended.output) == (launcher == "torchrun")
    assert last_words(tmp_path)["sentence"] == sentence
    check_resumed(tmp_path, undisturbed, 3, launcher)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
@pytest.mark.parametrize("launcher", ["deepspeed", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_everybody_gets_a_signal_the_bare_launcher_too(tmp_path, undisturbed, launcher, name):
    """As from a terminal or a batch system. The launcher may be gone before the ranks have saved."""
    words = command(launcher, 2, "finetune", flags(tmp_path))
    log = tmp_path / "log"
    with started(words, log, HAPLOVL_FAULT="slow_step@3:0 slow_write@6:0") as process:
        wait_for(f"iteration        2/ {STEPS:>7}", log, timeout=400)
        os.killpg(process.pid, signal.Signals[name])
        process.wait(timeout=240)
        end = time.monotonic() + 60
        while not (tmp_path / "save" / "last_words.json").exists():
            assert time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.1)
    said = last_words(tmp_path)
    assert said["code"] == 75 and said["sentence"].endswith(f"{name}; everything is saved"), log.read_text()[-3000:]
    check_resumed(tmp_path, undisturbed, said["step"], launcher)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "more", "step", "left_after"),
    [
        ("save", ["--save-interval", "2"], 2, 2),
        ("save", ["--save-interval", "2", "--async-save"], 2, 2),
        ("step", ["--save-interval", "2", "--async-save"], 3, 3),
        ("step", ["--pipeline-model-parallel-size", "2", "--pre-num-layers", "1"], 3, 3),
        ("step", ["--tensor-model-parallel-size", "1", "--zero-stage", "3"], 3, 3),
    ],
)
def test_during_a_save_and_in_other_layouts(tmp_path, place, more, step, left_after):
    words = command("deepspeed", 2, "finetune", flags(tmp_path, *more))
    ended = run_to_end(words, tmp_path / "log", HAPLOVL_FAULT=f"SIGTERM-{place}@{step}:1")
    assert ended.code == 75, ended.output[-3000:]
    assert last_words(tmp_path)["step"] == left_after
    ended = run_to_end(words, tmp_path / "resumed.log", HAPLOVL_FAULT_DONE=str(tmp_path / "log"))
    assert ended.code == 0, ended.output[-3000:]
    assert iterations(tmp_path / "metrics.jsonl") == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_during_an_evaluation(tmp_path, undisturbed):
    words = command("deepspeed", 2, "finetune", flags(tmp_path))
    ended = run_to_end(words, tmp_path / "log", HAPLOVL_FAULT="SIGUSR2-evaluate@6:1")
    assert ended.code == 0, "the evaluation behind the last step ends the run, which is done"
    assert losses(tmp_path / "metrics.jsonl") == undisturbed


@pytest.mark.parametrize("name", ["SIGTERM", *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])
def test_before_the_first_step_it_ends_at_once(tmp_path, name):
    ended = run_to_end(
        command("deepspeed", 2, "finetune", flags(tmp_path)), tmp_path / "log", HAPLOVL_FAULT=f"{name}-start@0:-1"
    )
    assert ended.code == 75, ended.output[-3000:]
    assert "Traceback" not in ended.output
    assert ended.output.count(f"{name} before the first step") == 1
    assert last_words(tmp_path)["code"] == 75
    assert not (tmp_path / "metrics.jsonl").exists() or iterations(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_a_launch_script_gets_a_signal(tmp_path, launcher):
    """Its whole process group, as from a terminal."""
    steps = ["--train-iters", "100000", "--num-workers", "1"]
    words = ["bash", "examples/ds_try_launch.sh", *TINY, *flags(tmp_path), *steps]
    log = tmp_path / "log"
    with started(words, log, LAUNCHER=launcher, NUM_GPUS="2", TMPDIR=str(tmp_path)) as process:
        wait_for("iteration        2/", log, timeout=400)
        os.killpg(process.pid, signal.SIGINT)
        code = process.wait(timeout=240)
    output = log.read_text()
    step = last_words(tmp_path)["step"]
    assert code == 75, output[-3000:]
    assert output.splitlines()[-1] == f"left after step {step} of 100000: SIGINT; everything is saved"
    assert "Traceback" not in output
    assert (tmp_path / "save" / f"global_step{step}").is_dir()
    assert list(tmp_path.glob("haplovl-launch*")) == []
