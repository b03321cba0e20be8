"""A run goes on where it stopped, on another number of ranks, in another layout, under another ZeRO stage.

Five steps after the change are compared with a run that never stopped. Planted once, in 20 of the cases: moments not
loaded (20 failed); first and second moments exchanged (20); the number of steps not set (20); pieces of another
tensor-parallel rank (8, all that were saved with tensor parallelism). Master weights that are not loaded make a
difference in bf16 only; `test_resume.py` sees that.
"""

from __future__ import annotations

import pytest

from tests.distributed.launch import run_ranks
from tests.metrics_files import logged

TRAIN_ITERS, SAVED_AFTER = 7, 2
RECIPES = ("distill", "full")
# Name -> (ranks, settings).
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "TP 2 x PP 2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "DP 2, ZeRO 3": (2, {"zero_stage": 3}),
    "TP 2 x DP 2, ZeRO 1": (4, {"tensor_model_parallel_size": 2, "zero_stage": 1}),
    "PP 4, ZeRO 0": (4, {"pipeline_model_parallel_size": 4, "zero_stage": 0}),
    "CP 2, ZeRO 2": (2, {"context_parallel_size": 2, "zero_stage": 2}),
}
# Measured worst case: 2.3e-7 (losses) and 9.9e-8 (norms).
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("topology")
    run_ranks("worker_topology.py", 4, str(folder), "save")
    run_ranks("worker_topology.py", 2, str(folder), "save")
    run_ranks("worker_topology.py", 2, str(folder), "resume")
    run_ranks("worker_topology.py", 4, str(folder), "resume")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_losses_go_on(folder, recipe, source, target):
    whole = logged(folder / f"{recipe} undisturbed.jsonl")
    parts = logged(folder / f"{recipe} {source}.jsonl") + logged(folder / f"{recipe} {source} -> {target}.jsonl")
    assert [line["iteration"] for line in parts] == list(range(1, TRAIN_ITERS + 1))
    for got, expected in zip(parts, whole, strict=True):
        for name in ("loss", "grad norm", "learning rate"):
            assert got[name] == pytest.approx(expected[name], rel=TOLERANCE), (got["iteration"], name)
