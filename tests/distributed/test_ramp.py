"""A batch that grows over several levels, in a run that counts samples: the same losses in every layout, and resumed.

Planted once to see this fail: DeepSpeed's count of micro-batches that does not begin anew with a level (losses of two
ranks from the fifth step on), and the pipeline's factor for micro-batches that of the largest step (all of its cases).
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.distributed.launch import run_ranks
from tests.distributed.test_resume import read

# Name -> (ranks, settings).
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {"parallel__zero_stage": 0}),
    "one process, micro-batch 2, ZeRO 1": (1, {"parallel__zero_stage": 1, "schedule__micro_batch_size": 2}),
    "DP 2, ZeRO 0": (2, {"parallel__zero_stage": 0}),
    "DP 2, ZeRO 1": (2, {"parallel__zero_stage": 1}),
    "DP 2, ZeRO 2, offload": (2, {"parallel__zero_stage": 2, "parallel__offload_optimizer": "cpu"}),
    "DP 2, ZeRO 3": (2, {"parallel__zero_stage": 3}),
    "PP 2, ZeRO 1": (2, {"parallel__zero_stage": 1, "parallel__pipeline_model_parallel_size": 2}),
}
# Unit -> settings, and the steps that follow from them. The odd numbers of samples leave micro-batches empty.
UNITS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "packs": ({"global_batch_size": 8, "rampup_batch_size": (2, 2, 12), "train_samples": 36}, [2, 2, 4, 6, 8, 8, 8]),
    "samples": ({"global_batch_size": 9, "rampup_batch_size": (3, 2, 18), "train_samples": 40}, [3, 3, 5, 5, 7, 9, 9]),
}
STOPPED_AFTER = 3
# Measured worst case: 1.2e-7 (losses) and 1.4e-7 (norms).
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ramp")
    for ranks in (1, 2):
        run_ranks("worker_ramp.py", ranks, str(folder))
    return folder


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one process"])
def test_losses_are_those_of_one_process(folder, layout, unit):
    sizes = UNITS[unit][1]
    got, expected = (read(folder / f"{name} {unit} whole.jsonl") for name in (layout, "one process"))
    assert [line["global batch size"] for line in got] == sizes
    assert [line["consumed samples"] for line in got] == [sum(sizes[: step + 1]) for step in range(len(sizes))]
    for line, other in zip(got, expected, strict=True):
        assert line["learning rate"] == other["learning rate"]
        for name in ("loss", "grad norm"):
            assert line[name] == pytest.approx(other[name], rel=TOLERANCE), (line["iteration"], name)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_resumed_within_the_ramp_equals_undisturbed(folder, layout, unit):
    whole, stopped, resumed = (
        read(folder / f"{layout} {unit} {part}.jsonl") for part in ("whole", "stopped", "resumed")
    )
    assert len(stopped) == STOPPED_AFTER and stopped + resumed == whole


@pytest.mark.parametrize("unit", UNITS)
def test_a_checkpoint_says_what_its_ramp_was_and_keeps_it(folder, unit):
    """With another one, or with none, the position in the data would be lost."""
    ramp = UNITS[unit][0]["rampup_batch_size"]
    state = json.loads(
        (folder / f"DP 2, ZeRO 1 {unit}" / f"global_step{STOPPED_AFTER}/training_state.json").read_text()
    )
    assert tuple(state["rampup_batch_size"]) == ramp
    was = f"was saved with --rampup-batch-size {' '.join(map(str, ramp))}, this run has "
    found = (folder / f"one process {unit} refused").read_text().splitlines()
    assert [was in line for line in found] == [True, True]
    assert "no --rampup-batch-size" in found[0] and "--rampup-batch-size 1 1 9" in found[1]
