"""What the planner says that DeepSpeed holds, against what two ranks of DeepSpeed hold."""

from __future__ import annotations

import json

import pytest

from megatron_haplovl.parallel.engine_memory import DEFAULT_BUCKETS, engine_memory
from tests.distributed.launch import run_ranks

# As in worker_engine_memory.py, which imports DeepSpeed.
WIDTH, LAYERS, FROZEN = 384, 6, 2


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[bool, int], int]:
    """(bf16, ZeRO stage) -> bytes on rank 0."""
    path = tmp_path_factory.mktemp("memory") / "held.json"
    run_ranks("worker_engine_memory.py", 2, str(path))
    return {(record["bf16"], record["zero_stage"]): record["bytes"] for record in json.loads(path.read_text())}


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("bf16", [False, True])
def test_static_memory(records: dict[tuple[bool, int], int], bf16: bool, zero_stage: int) -> None:
    parameters, trained = LAYERS * WIDTH**2, (LAYERS - FROZEN) * WIDTH**2
    expected = engine_memory(parameters, [trained], bf16=bf16, zero_stage=zero_stage, replicas=2)
    total = expected.weights
    if zero_stage == 3 or (zero_stage == 1 and not bf16):
        # ZeRO 2 has given its bucket back by the end of a backward pass, and ZeRO 3 what it had gathered.
        total += (2 if bf16 else 4) * DEFAULT_BUCKETS.reduce_bucket_size
    # Measured: 8 bytes apart.
    assert records[bf16, zero_stage] == pytest.approx(total, abs=0.001 * parameters)
