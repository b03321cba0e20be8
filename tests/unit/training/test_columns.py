"""Columns that can be computed without a run."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_haplovl.config.cli import build_config
from megatron_haplovl.config.stages import FINETUNE, PRETRAIN, StageSpec
from megatron_haplovl.operation.phase import PhaseClock, Spent
from megatron_haplovl.parallel.groups import Group, ParallelGroups
from megatron_haplovl.planning.machine import peak_operations
from megatron_haplovl.training.flops import training_flops
from megatron_haplovl.training.forecast import Forecast
from megatron_haplovl.training.memory import GIB, host_free_bytes, peak_bytes
from megatron_haplovl.training.rank_figures import (
    ForwardTime,
    RankFigures,
    forward_is_alone,
    gather_figures,
    rank_columns,
    readers,
)
from tests.unit.model.test_model import TINY

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA GH200 480GB", 989.0),
        ("NVIDIA H20", 148.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
    ],
)
def test_peak_of_known_devices(name: str, tflops: float) -> None:
    assert peak_operations(name) == 1e12 * tflops


@pytest.mark.parametrize(
    "name", ["NVIDIA A10", "NVIDIA L40", "Tesla V100-SXM2-32GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "", "cpu"]
)
def test_no_peak_is_better_than_a_wrong_one(name: str) -> None:
    assert peak_operations(name) is None


@pytest.mark.parametrize("stage", [FINETUNE, PRETRAIN], ids=str)
def test_operations_of_frozen_parts(stage: StageSpec) -> None:
    """Against a walk over the layers: forward, the gradient of the input where it is needed, that of the weights."""
    sizes: dict[str, Any] = {"tokens": 10, "head_tokens": 3, "visible_pairs": 77}
    pre, connector, post, words = 2 * 2048 * 10, 16 * 24 * 10, 2 * 4032 * 10, 50 * 24 * 3
    pre_pairs, post_pairs = 2 * 16 * 77, 2 * 24 * 77
    expected: dict[tuple[str, ...], int] = {
        ("connector",): 2 * pre + 4 * pre_pairs + 4 * connector + 4 * post + 12 * post_pairs + 4 * words,
        ("post_decoder",): 2 * pre + 4 * pre_pairs + 2 * connector + 4 * post + 12 * post_pairs + 6 * words,
        ("embedding",): 4 * pre + 12 * pre_pairs + 4 * connector + 4 * post + 12 * post_pairs + 4 * words,
    }
    # What lies first has no input to pass a gradient to; its matrices count 4, too.
    if stage is PRETRAIN:
        expected = {
            ("embedding", "pre_decoder", "distillation"): 6 * pre + 12 * pre_pairs + 4 * words,
            ("distillation",): 2 * pre + 4 * pre_pairs + 2 * words,
        }
    for parts, operations in expected.items():
        assert training_flops(TINY, stage=stage, trained=set(parts), **sizes) == operations, parts


def test_time_to_the_end_is_what_is_still_to_come() -> None:
    """Against a walk over all steps that are left."""
    base = build_config("finetune", "haplovl-debug", {("data", "mock_data"): True, ("schedule", "train_iters"): 103})
    for eval_interval, save_interval, save in ((10, 25, "runs/x"), (None, None, "runs/x"), (7, None, None)):
        config = dataclasses.replace(
            base,
            logging=dataclasses.replace(base.logging, eval_interval=eval_interval),
            checkpoint=dataclasses.replace(base.checkpoint, save=save, save_interval=save_interval),
        )
        clock = PhaseClock()
        clock.spent = {"evaluate": Spent(2, 8.0), "save": Spent(4, 30.0), "loader": Spent(99, 1.0)}
        forecast = Forecast(config, clock, 5)
        for seconds in (60.0, 2.0, 4.0):  # The first step is slow.
            forecast.add(seconds)
        for step in (6, 9, 10, 25, 99, 100, 102, 103):
            left = 3.0 * (103 - step)
            for interval, seconds in ((eval_interval, 8.0), (save_interval, 30.0)):
                due = [s for s in range(6, 104) if s == 103 or (interval and s % interval == 0)]
                done = [s for s in due if s <= step]
                left += seconds / len(done) * (len(due) - len(done)) if done else 0.0
            assert forecast.seconds_left(step) == pytest.approx(left), (step, eval_interval)


def test_before_anything_is_measured_only_steps_count() -> None:
    config = build_config("finetune", "haplovl-debug", {("data", "mock_data"): True, ("schedule", "train_iters"): 11})
    forecast = Forecast(config, PhaseClock())
    forecast.add(5.0)
    assert forecast.seconds_left(1) == 50.0


def test_steps_that_grow_take_longer() -> None:
    """Against a walk over all steps that are left, each of which takes half a second a sample."""
    values = {"train_iters": 40, "global_batch_size": 16, "rampup_batch_size": (4, 4, 48)}
    settings: dict[tuple[str, ...], Any] = {("schedule", name): value for name, value in values.items()}
    sizes = [4] * 4 + [8] * 2 + [12] * 2 + [16] * 32
    forecast = Forecast(build_config("finetune", "haplovl-debug", settings), PhaseClock(), 1)
    for step, seconds in enumerate((9.0, *(size / 2 for size in sizes[2:8])), start=1):
        forecast.add(seconds)
        each = 9.0 / 4 if step == 1 else 0.5
        assert forecast.seconds_left(step + 1) == pytest.approx(each * sum(sizes[step + 1 :]))


def test_the_clock_counts_phases() -> None:
    clock = PhaseClock()
    for _ in range(3):
        with clock.during("save"):
            time.sleep(0.02)
    assert clock.spent["save"].times == 3 and 0.06 <= clock.spent["save"].seconds < 0.5


def test_forward_passes_are_timed_and_nothing_else() -> None:
    told: list[str] = []
    timer = ForwardTime(told.append, CPU)
    for _ in range(2):
        for phase, seconds in (("loader", 0.05), ("forward", 0.03), ("backward", 0.05), ("reduce", 0.05)):
            timer.enter(phase)
            time.sleep(seconds)
    assert told == ["loader", "forward", "backward", "reduce"] * 2
    assert 0.06 <= timer.take() < 0.1
    assert timer.take() == 0.0


def test_the_slowest_rank_is_named() -> None:
    figures = [RankFigures(0.0, own, 0.0, 0.0) for own in (2.0, 5.0, 1.0)]
    assert rank_columns(figures, 2) == {
        "slowest rank": 1,
        "slowest rank (ms)": 2500.0,
        "fastest rank": 2,
        "fastest rank (ms)": 500.0,
    }
    assert rank_columns(figures[:1], 2) == {}
    assert gather_figures(figures[1], Group()) == [figures[1]]


def test_ranks_that_share_data_are_counted_once() -> None:
    """Ranks are ordered pipeline, data, context, tensor."""
    groups = ParallelGroups(pipeline=Group(0, 2), data=Group(0, 3), context=Group(0, 2), tensor=Group(0, 2))
    figures = [RankFigures(0.0, 0.0, 0.0, rank) for rank in range(24)]
    assert [figure.positions for figure in readers(figures, groups)] == [0, 4, 8]


def test_a_forward_pass_with_messages_says_nothing_of_its_rank() -> None:
    assert forward_is_alone(ParallelGroups(), 2)
    assert not forward_is_alone(ParallelGroups(), 3)
    for name in ("tensor", "context", "pipeline"):
        assert not forward_is_alone(dataclasses.replace(ParallelGroups(), **{name: Group(0, 2)}), 1)


def test_memory_of_the_process_grows_with_what_it_holds() -> None:
    before = peak_bytes(CPU)
    held = torch.ones(peak_bytes(CPU) // 4 + 2**26)
    assert peak_bytes(CPU) >= before - 2**20 and peak_bytes(CPU) >= held.numel() * 4
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    assert peak_bytes(CPU) == pytest.approx(1024 * kib, rel=0.02)


def test_a_container_may_have_less_than_its_host(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: 99 kB\nMemAvailable: {20 * GIB // 1024} kB\n")
    assert host_free_bytes(meminfo, tmp_path) == 20 * GIB
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text(f"{5 * GIB}\n")
    assert host_free_bytes(meminfo, tmp_path) == 20 * GIB
    (tmp_path / "memory.max").write_text(f"{8 * GIB}\n")
    assert host_free_bytes(meminfo, tmp_path) == 3 * GIB
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {GIB}\n")
    assert host_free_bytes(meminfo, tmp_path) == 4 * GIB
    assert host_free_bytes(tmp_path / "none", tmp_path) is None
