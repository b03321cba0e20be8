"""A run that stops after step k and resumes repeats exactly the losses of a run that never stopped, on two ranks.

Planted once to see this fail: optimizer state not loaded, its first moments set to zero (with and without
offload), and reading from the first pack after resuming.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_haplovl.checkpoint.pieces import PieceReader
from tests.distributed.launch import run_ranks
from tests.metrics_files import logged

TRAIN_ITERS, RESUMED_AFTER = 6, 4
CASES: list[tuple[str, str, int, bool, dict[str, Any]]] = [
    (f"{recipe}-zero{zero_stage}-{'bf16' if bf16 else 'fp32'}", recipe, zero_stage, bf16, {})
    for recipe, zero_stage, bf16 in (
        ("distill", 0, False),
        ("distill", 1, True),
        ("align", 2, False),
        ("align", 3, True),
        ("full", 0, True),
        ("full", 1, False),
        ("full", 2, True),
        ("full", 3, False),
    )
] + [
    ("distill-tensor2-zero1", "distill", 1, False, {"parallel__tensor_model_parallel_size": 2}),
    (
        "full-tensor2-sequence-zero3",
        *("full", 3, True),
        {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": True},
    ),
    ("full-context2-zero2", "full", 2, False, {"parallel__context_parallel_size": 2}),
    ("full-pipeline2-zero1", "full", 1, True, {"parallel__pipeline_model_parallel_size": 2}),
    ("distill-pipeline2-zero0", "distill", 0, False, {"parallel__pipeline_model_parallel_size": 2}),
    ("distill-offload-zero1", "distill", 1, True, {"parallel__offload_optimizer": "cpu"}),
    ("full-offload-zero2", "full", 2, False, {"parallel__offload_optimizer": "cpu"}),
    (
        "full-tensor2-offload-zero3",
        *("full", 3, True),
        {
            "parallel__tensor_model_parallel_size": 2,
            "parallel__offload_optimizer": "cpu",
            "parallel__offload_param": "cpu",
        },
    ),
    (
        "align-offload-zero3",
        "align",
        3,
        False,
        {"parallel__offload_optimizer": "cpu", "parallel__offload_param": "cpu"},
    ),
]
CASES_OF_4_RANKS = [
    ("full-pipeline4-zero1", "full", 1, False, {"parallel__pipeline_model_parallel_size": 4}),
    (
        "distill-tensor2-pipeline2-zero1",
        *("distill", 1, True),
        {"parallel__tensor_model_parallel_size": 2, "parallel__pipeline_model_parallel_size": 2},
    ),
]
TIMES = {
    "time",
    "elapsed time per iteration (ms)",
    "loader wait (ms)",
    "slowest rank",
    "slowest rank (ms)",
    "fastest rank",
    "fastest rank (ms)",
    "peak memory (GiB)",
    "time to the end (h)",
    "samples per second",
    "tokens per gpu per second (tgs)",
    "TFLOPs",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


def run(folder, name, ranks):
    """The folder of a case, which runs when it is first asked for."""
    if not (folder / name).exists():
        run_ranks("worker_resume.py", ranks, str(folder), name)
    return folder / name


def read(path):
    return [{key: value for key, value in line.items() if key not in TIMES} for line in logged(path)]


@pytest.mark.parametrize("name", [case[0] for case in CASES])
def test_resumed_equals_undisturbed(folder, name, ranks=2):
    case = run(folder, name, ranks)
    whole, stopped, resumed = (read(case / f"{part}.jsonl") for part in ("whole", "stopped", "resumed"))
    assert [line["iteration"] for line in resumed] == list(range(RESUMED_AFTER + 1, TRAIN_ITERS + 1))
    assert stopped + resumed == whole


@pytest.mark.slow
@pytest.mark.parametrize("name", [case[0] for case in CASES_OF_4_RANKS])
def test_resumed_equals_undisturbed_on_4_ranks(folder, name):
    test_resumed_equals_undisturbed(folder, name, ranks=4)
    test_final_weights_are_identical(folder, name)


@pytest.mark.parametrize("name", [case[0] for case in CASES])
def test_final_weights_are_identical(folder, name):
    case = run(folder, name, 2)
    whole, broken = (PieceReader(case / part / f"global_step{TRAIN_ITERS}") for part in ("whole", "broken"))
    assert whole.names() == broken.names()
    assert all((whole.get(n) == broken.get(n)).all() for n in whole.names())


@pytest.mark.parametrize("name", [case[0] for case in CASES])
def test_the_checkpoint_folder_has_its_files(folder, name):
    save = run(folder, name, 2) / "broken"
    assert (save / "latest").read_text().strip() == f"global_step{TRAIN_ITERS}"
    assert (save / "latest_checkpointed_iteration.txt").read_text().strip() == str(TRAIN_ITERS)
    saved = json.loads((save / "latest").with_name(f"global_step{RESUMED_AFTER}").joinpath("config.json").read_text())
    assert saved["iteration"] == RESUMED_AFTER
