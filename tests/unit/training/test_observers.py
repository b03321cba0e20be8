"""What observes a run: profiler, garbage collection, live display, and the memory that is said at its start."""

from __future__ import annotations

import gc
import gzip
import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_haplovl.config.cli import build_config, parse_args
from megatron_haplovl.config.schema import ProfileConfig, RunConfig
from megatron_haplovl.config.validate import validate
from megatron_haplovl.losses.language_modeling import next_token_loss
from megatron_haplovl.planning.engine_memory import engine_memory
from megatron_haplovl.planning.estimate import RankMemory
from megatron_haplovl.training.collection import GarbageCollection
from megatron_haplovl.training.live_display import LiveDisplay
from megatron_haplovl.training.memory import GIB
from megatron_haplovl.training.memory_report import describe_memory, does_not_fit
from megatron_haplovl.training.profiling import Profiler
from tests.unit.model.test_model import TINY, make_batch, make_model

CPU = torch.device("cpu")


def profiled(folder: Path, config: ProfileConfig, rank: int = 0, steps: int = 5) -> Profiler:
    """A profiler after some steps of a tiny model, by the calls of the training."""
    model, batch = make_model(TINY), make_batch([["t", "I", "t", "t"]], 12)
    profiler = Profiler(config, folder, rank, model, CPU)
    for step in range(steps):
        profiler.before_step(step)
        for phase in ("loader", "forward"):
            profiler.enter(phase)
        losses = model(batch, next_token_loss)
        profiler.enter("backward")
        losses["lm loss"].backward()
        profiler.enter("reduce")
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        profiler.after_step(step + 1)
    return profiler


def events(file: Path) -> list[dict[str, Any]]:
    found = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return [event for event in found if event.get("cat") == "user_annotation"]


def test_every_part_of_the_recorded_steps_has_its_range(tmp_path: Path) -> None:
    profiled(tmp_path, ProfileConfig(profile=True, profile_step_start=1, profile_step_end=3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank0_steps2-3.json.gz", "rank0_steps2-3.txt"]
    names = [event["name"] for event in events(tmp_path / "rank0_steps2-3.json.gz")]
    layers = ["embedding", "pre_decoder.0", "pre_decoder.1", "connector", "post_decoder.0", "post_decoder.1"]
    layers += ["final_norm"]
    wanted = ["loader", "forward", "backward", "reduce and optimizer", "loss", "head: lm_head", *layers]
    for name in [*wanted, *(f"backward: {layer}" for layer in layers)]:
        assert names.count(name) == 2, name
    assert names.count("Optimizer.step#SGD.step") == 2
    assert "pre_decoder.0" in (tmp_path / "rank0_steps2-3.txt").read_text()


def test_ranges_lie_inside_one_another(tmp_path: Path) -> None:
    profiled(tmp_path, ProfileConfig(profile=True, profile_step_start=0, profile_step_end=1), steps=1)
    spans = {e["name"]: (e["ts"], e["ts"] + e["dur"]) for e in events(tmp_path / "rank0_steps1-1.json.gz")}
    for inner, outer in (
        ("pre_decoder.1", "forward"),
        ("loss", "head: lm_head"),
        ("backward: pre_decoder.1", "backward"),
        ("Optimizer.step#SGD.step", "reduce and optimizer"),
    ):
        assert spans[outer][0] <= spans[inner][0] and spans[inner][1] <= spans[outer][1], inner
    assert spans["backward: post_decoder.0"][1] <= spans["backward: connector"][0]


@pytest.mark.parametrize(
    ("config", "rank"),
    [
        (ProfileConfig(profile_step_start=1, profile_step_end=3), 0),
        (ProfileConfig(profile=True, profile_step_start=1, profile_step_end=3, profile_ranks=(1,)), 0),
        (ProfileConfig(profile=True, profile_step_start=5, profile_step_end=6), 0),
    ],
)
def test_nothing_is_recorded_elsewhere(tmp_path: Path, config: ProfileConfig, rank: int) -> None:
    profiled(tmp_path / "profile", config, rank).close()
    assert not (tmp_path / "profile").exists()


def test_a_run_that_ends_early_keeps_what_was_recorded(tmp_path: Path) -> None:
    profiled(tmp_path, ProfileConfig(profile=True, profile_step_start=3, profile_step_end=9)).close()
    assert [e["name"] for e in events(tmp_path / "rank0_steps4-9.json.gz")].count("connector") == 2


def test_a_trace_that_cannot_be_written_ends_nothing(tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "profile").write_text("a file in the way")
    logging.getLogger("megatron_haplovl").propagate = True
    profiled(tmp_path / "profile", ProfileConfig(profile=True, profile_step_start=1, profile_step_end=3))
    assert "profile: FileExistsError" in caplog.text


def test_a_cpu_has_no_history_of_its_memory(tmp_path: Path, caplog: Any) -> None:
    logging.getLogger("megatron_haplovl").propagate = True
    profiled(tmp_path, ProfileConfig(profile=True, record_memory_history=True), steps=0)
    assert "torch keeps it for GPUs only, not for cpu; there is none" in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--profile",), "--profile writes to the folder profile in --save; give --save or --profile-dir"),
        (("--profile-step-start", "12"), "--profile-step-start 12 must be at least 0 and less than --profile-step-end"),
        (("--profile-ranks", "0", "-1"), "--profile-ranks must be at least 0, got 0 -1"),
        (("--record-memory-history",), "records the steps of --profile"),
        (("--manual-gc-interval", "5"), "need --manual-gc"),
        (("--no-manual-gc-eval",), "need --manual-gc"),
        (("--manual-gc", "--manual-gc-interval", "-1"), "must be at least 0, got -1"),
        (("--device-peak-tflops", "0"), "must be above 0"),
    ],
)
def test_contradictions_are_refused(flags: tuple[str, ...], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        parse_args("finetune", argv=["--model", "haplovl-debug", "--mock-data", *flags])
    assert message in capsys.readouterr().err


def test_deepspeeds_timers_are_asked_for() -> None:
    from megatron_haplovl.engine.deepspeed_config import deepspeed_config

    for wanted in (False, True):
        overrides: dict[tuple[str, ...], Any] = {("data", "mock_data"): True}
        config = build_config("finetune", "haplovl-debug", {**overrides, ("profile", "wall_clock_breakdown"): wanted})
        validate(config)
        assert deepspeed_config(config, 1)["wall_clock_breakdown"] is wanted


def test_garbage_is_collected_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    monkeypatch.setattr(gc, "collect", lambda: called.append(1))
    collection = GarbageCollection(RunConfig(manual_gc=True, manual_gc_interval=3))
    try:
        assert not gc.isenabled() and len(called) == 1
        for step in range(1, 8):
            collection.after_step(step)
        assert len(called) == 1 + 2
        with collection.around_evaluation():
            assert len(called) == 4
        assert len(called) == 5
    finally:
        collection.close()
    assert gc.isenabled()
    quiet = GarbageCollection(RunConfig(manual_gc=True, manual_gc_eval=False))
    with quiet.around_evaluation():
        quiet.after_step(1)
    quiet.close()
    untouched = GarbageCollection(RunConfig())
    with untouched.around_evaluation():
        untouched.after_step(1)
    assert len(called) == 6 and gc.isenabled()


# --- the live display ---


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def display_on(stream: io.StringIO, *, wanted: bool = True) -> tuple[LiveDisplay, logging.Logger]:
    handler = logging.StreamHandler(stream)
    log = logging.Logger("a run", logging.INFO)
    log.addHandler(handler)
    return LiveDisplay(100, handler, wanted=wanted), log


def test_lines_stay_whole_and_the_state_is_below_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = _Terminal()
    display, log = display_on(stream)
    line = " iteration | " + "loss: [1.0] | " * 40
    log.info(line)
    display.report({"loss": 1.25, "time to the end (h)": 1.5})
    display.step(10, 0.5)
    shown = stream.getvalue()
    # As long as it is, the line is one line, and its brackets are no markup.
    assert line in shown
    assert "step 10 of 100, 0.50 s, 1 h 30 min to the end" in shown and "1.25" in shown
    # The cursor stays: a process that is killed could not show it again.
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    display.close()
    log.info("the end")
    assert stream.getvalue().endswith("the end\n")


@pytest.mark.parametrize("why", ["no terminal", "not wanted", "no rich"])
def test_elsewhere_there_are_lines_only(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    if why == "no rich":
        monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    stream = io.StringIO() if why == "no terminal" else _Terminal()
    display, log = display_on(stream, wanted=why != "not wanted")
    log.info("a line")
    display.report({"loss": 1.0})
    display.step(1, 1.0)
    display.close()
    assert stream.getvalue() == "a line\n"


# --- memory at the start ---


def memory(host: bool = False) -> RankMemory:
    engine = engine_memory(GIB, [GIB], bf16=True, zero_stage=2, replicas=4, offload_optimizer=host)
    return RankMemory(engine=engine, activations=3.0 * GIB, working=GIB, teacher=0.0, messages=0.0)


def test_what_is_expected_is_beside_what_is_free() -> None:
    needed = memory()
    line = describe_memory(needed, CPU, 8 * GIB, 8 * GIB)
    assert line.startswith(f"memory: {needed.peak / GIB:.2f} GiB expected on this rank (weights 2.00, ")
    assert "activations 4.00" in line and line.endswith("8.00 GiB free on cpu")
    assert "an unknown number of GiB free" in describe_memory(needed, CPU, None, None)
    assert "expected on its host, 2.00 GiB free there" in describe_memory(memory(host=True), CPU, GIB, 2 * GIB)


def test_what_does_not_fit_is_said_with_what_to_change() -> None:
    needed = memory()
    assert does_not_fit(needed, CPU, int(needed.peak) + 1, 0) is None
    assert does_not_fit(needed, CPU, None, None) is None
    sentence = does_not_fit(needed, CPU, int(needed.peak) - 1, 0)
    assert sentence is not None and "it may end out of memory; change --recompute-granularity" in sentence
    offloaded = does_not_fit(memory(host=True), CPU, 100 * GIB, 1)
    assert offloaded is not None and "on the host" in offloaded
