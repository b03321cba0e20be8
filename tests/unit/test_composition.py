"""The composition table of `docs/parallelism.md` says neither more nor less than the distributed tests show."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from tests.distributed.cases import COMPILED_LAYOUTS, LARGE_LAYOUTS, PARALLEL_LAYOUTS

Layout = dict[str, Any]
DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "parallelism.md"


def size(name: str) -> Callable[[Layout], bool]:
    return lambda layout: layout.get(name, 1) > 1


def zero(stage: int) -> Callable[[Layout], bool]:
    return lambda layout: layout["zero_stage"] == stage


def data_parallel(layout: Layout) -> bool:
    shared = ("tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size")
    ranks = 8 if layout in LARGE_LAYOUTS.values() else 4
    for name in shared:
        ranks //= layout.get(name, 1)
    return ranks > 1


HAS: dict[str, Callable[[Layout], bool]] = {
    "TP": size("tensor_model_parallel_size"),
    "SP": lambda layout: layout.get("sequence_parallel", False),
    "PP": size("pipeline_model_parallel_size"),
    "CP": size("context_parallel_size"),
    **{f"ZeRO {stage}": zero(stage) for stage in range(4)},
    "optimizer on host": lambda layout: layout.get("offload_optimizer") == "cpu",
    "parameters on host": lambda layout: layout.get("offload_param") == "cpu",
    # Every layout runs both stages, and one of several data-parallel ranks has no images in some micro-batch.
    "stage 1": lambda _: True,
    "stage 2, everything": lambda _: True,
    "text-only rank": data_parallel,
    "`--recompute-granularity`": lambda layout: "recompute_granularity" in layout,
}


def table() -> list[tuple[str, str, str]]:
    """(row, column, cell) of every cell."""
    lines = DOCUMENT.read_text().split("## What composes with what")[1].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    header, _, *body = rows
    return [(row[0], column, cell) for row in body for column, cell in zip(header[1:], row[1:], strict=True)]


@pytest.mark.parametrize(("row", "column", "cell"), table())
def test_a_cell_is_tested_if_and_only_if_it_says_so(row, column, cell):
    layouts = [*PARALLEL_LAYOUTS.values(), *LARGE_LAYOUTS.values()]
    if row == "`--compile`":
        covered = any(HAS[column](PARALLEL_LAYOUTS[name]) for name in COMPILED_LAYOUTS)
    else:
        covered = row != column and any(HAS[row](layout) and HAS[column](layout) for layout in layouts)
    expected = {"**tested**": True, "*refused*": False, "": False, "needs TP": True}[cell]
    assert covered == expected, f"{row} with {column}"


def test_every_feature_has_a_row():
    assert {row for row, _, _ in table()} >= {
        "TP",
        "SP",
        "PP",
        "CP",
        "stage 1",
        "stage 2, everything",
        "text-only rank",
    }
