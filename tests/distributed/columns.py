"""The runs of worker_columns.py."""

from __future__ import annotations

from typing import Any

STEPS = 4

CASES: dict[str, dict[str, Any]] = {
    "full-zero0": {"parallel__zero_stage": 0, "optimizer__connector_lr": 4e-3},
    "full-zero1": {"parallel__zero_stage": 1},
    "full-zero2": {"parallel__zero_stage": 2},
    "full-zero3": {"parallel__zero_stage": 3},
    "distill-zero1": {"recipe": "distill", "parallel__zero_stage": 1},
    "align-zero1": {"recipe": "align", "parallel__zero_stage": 1},
}
