"""A loss or a gradient that is not finite: every rank says the same true sentence, and nothing has changed.

In every layout of two ranks, fp32 and bf16, offloaded or not. Rank 1 has the fault.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.distributed.launch import run_ranks
from tests.distributed.worker_not_finite import LAYOUTS

# One of each kind of optimizer and engine; the others are alike.
QUICK = (
    *("DP 2, ZeRO 0, fp32", "DP 2, ZeRO 1, bf16", "DP 2, ZeRO 2, fp32", "DP 2, ZeRO 2, bf16, offloaded"),
    *(
        "DP 2, ZeRO 3, bf16",
        "TP 2 + SP, ZeRO 3, fp32",
        "CP 2, ZeRO 1, fp32",
        "PP 2, ZeRO 1, bf16",
        "PP 2, ZeRO 0, fp32",
    ),
)


def check(folder: Path, layouts: tuple[str, ...]) -> str:
    printed = run_ranks("worker_not_finite.py", 2, str(folder), *layouts)
    answers: list[dict[str, Any]] = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    for name in layouts:
        for found in answers:
            check_layout(
                folder, name, {key.partition(": ")[2]: found[key] for key in found if key.startswith(f"{name}:")}
            )
        assert answers[0][f"{name}: output"]["message"] == answers[1][f"{name}: output"]["message"]
    return printed


def check_layout(folder: Path, name: str, found: dict[str, Any]) -> None:
    for kind in ("output", "weight", "gradient", "gradient, once", "gradient, twice"):
        assert found[kind]["changed"] == [], (name, kind)
    for kind in ("output", "weight"):
        end = found[kind]
        assert (end["code"], end["cause"]) == (70, "loss not finite"), (name, end)
        assert re.match(r"step 2: a loss is not finite \(loss nan, lm loss nan\), from rank [01] on ", end["message"])
        assert "; the weights were not updated. " in end["message"]
    output = found["output"]["message"]
    # Two tensor-parallel ranks have the same micro-batch, so the first of them stands for both.
    rank = 0 if name.startswith("TP") else 1
    assert f"from rank {rank} on " in output, (name, output)
    assert "the first layer whose output is not finite is post_decoder.1.mlp.up_proj, on rank 1;" in output, (
        name,
        output,
    )
    hit = re.search(r"micro-batch 2 of 2 \(mock data sample (\d+)", output)
    assert hit is not None, (name, output)
    stem = folder / name / "debug" / f"step2-rank{rank}-micro-batch2"
    record = json.loads(stem.with_suffix(".json").read_text())
    assert record["samples"][0] == {"prefix": "mock data", "sample": int(hit[1])}
    assert load_file(stem.with_suffix(".safetensors"))["tokens_BS"].shape == (1, 96)
    weight = found["weight"]["message"]
    assert "the weight final_norm.weight is not finite itself, on rank 1;" in weight, (name, weight)
    assert "the first layer whose output is not finite is final_norm, on rank" in weight, (name, weight)
    gradient = found["gradient"]
    assert (gradient["code"], gradient["cause"]) == (70, "gradient not finite"), (name, gradient)
    said = (
        "step 2: the gradient of final_norm.weight is not finite on rank 1, though the losses are; it is from rank 1 on"
    )
    assert said in gradient["message"], (name, gradient)
    assert "micro-batch 2 of 2 (mock data" in gradient["message"]
    assert found["gradient, once"]["updated"] is False, name
    twice = found["gradient, twice"]
    assert (twice["code"], twice["cause"]) == (1, "too many skipped steps")
    assert twice["message"].endswith("That is step 2 in a row, and --max-skipped-steps is 1"), twice
    assert found["counts"] == [1, 1]
    assert 0 < found["after"]["loss"] < 10, name


def test_every_rank_names_the_source_and_nothing_changes(tmp_path):
    printed = check(tmp_path, QUICK)
    assert "OVERFLOW" not in printed, "DeepSpeed speaks of every update that it leaves out"
    assert "skipped (1 in a row, --max-skipped-steps 1)" in printed


@pytest.mark.slow
def test_in_every_layout(tmp_path):
    check(tmp_path, tuple(LAYOUTS))
