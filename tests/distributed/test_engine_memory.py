"""The memory that the planner predicts for DeepSpeed, against what two ranks of DeepSpeed hold."""

from __future__ import annotations

import json

import pytest

from megatron_haplovl.planning.engine_memory import DEFAULT_BUCKETS, engine_memory
from tests.distributed.launch import run_ranks

# As in worker_engine_memory.py, which imports DeepSpeed.
WIDTH, LAYERS, FROZEN = 384, 6, 2
OFFLOADED = [
    *((zero_stage, ("offload_optimizer",)) for zero_stage in (1, 2, 3)),
    *((3, offload) for offload in (("offload_param",), ("offload_optimizer", "offload_param"))),
]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[bool, int, tuple[str, ...]], int]:
    """(bf16, ZeRO stage, what is offloaded) -> bytes on rank 0."""
    path = tmp_path_factory.mktemp("memory") / "held.json"
    run_ranks("worker_engine_memory.py", 2, str(path))
    return {
        (record["bf16"], record["zero_stage"], tuple(record["offload"])): record["bytes"]
        for record in json.loads(path.read_text())
    }


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("bf16", [False, True])
def test_static_memory(records: dict[tuple[bool, int, tuple[str, ...]], int], bf16: bool, zero_stage: int) -> None:
    parameters, trained = LAYERS * WIDTH**2, (LAYERS - FROZEN) * WIDTH**2
    expected = engine_memory(parameters, [trained], bf16=bf16, zero_stage=zero_stage, replicas=2)
    total = expected.weights
    if zero_stage == 3 or (zero_stage == 1 and not bf16):
        # ZeRO 2 has given its bucket back by the end of a backward pass, and ZeRO 3 what it had gathered.
        total += (2 if bf16 else 4) * DEFAULT_BUCKETS.reduce_bucket_size
    # Measured: 8 bytes apart.
    assert records[bf16, zero_stage, ()] == pytest.approx(total, abs=0.001 * parameters)


@pytest.mark.parametrize(("zero_stage", "offload"), OFFLOADED)
@pytest.mark.parametrize("bf16", [False, True])
def test_offloaded_memory(
    records: dict[tuple[bool, int, tuple[str, ...]], int], bf16: bool, zero_stage: int, offload: tuple[str, ...]
) -> None:
    parameters, trained = LAYERS * WIDTH**2, (LAYERS - FROZEN) * WIDTH**2
    expected = engine_memory(
        parameters,
        [trained],
        bf16=bf16,
        zero_stage=zero_stage,
        replicas=2,
        offload_optimizer="offload_optimizer" in offload,
        offload_param="offload_param" in offload,
    )
    total = expected.weights + expected.host
    element, share = 2 if bf16 else 4, trained / 2
    if zero_stage != 2:
        total += (4 if zero_stage == 1 else element) * DEFAULT_BUCKETS.reduce_bucket_size
    if zero_stage < 3:
        total += 2 * element * WIDTH**2  # Two buffers of the largest parameter's size.
    if (bf16, zero_stage) in ((True, 1), (False, 2)):
        total -= 4 * share  # The last micro-batch's reduced sum is on the host by the end of the backward pass.
    # Measured: 41 bytes apart.
    assert records[bf16, zero_stage, offload] == pytest.approx(total, abs=0.001 * parameters)
