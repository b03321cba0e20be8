"""Every column of the log line against figures that were counted in another way, on two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_haplovl.config.stages import FINETUNE, PRETRAIN
from megatron_haplovl.training.flops import training_flops
from megatron_haplovl.training.recipe import trained_parts
from tests.distributed.cases import config
from tests.distributed.columns import CASES, STEPS
from tests.distributed.launch import run_ranks
from tests.metrics_files import logged


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("columns")
    run_ranks("worker_columns.py", 2, str(made))
    return made


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return logged(folder / f"{name}.jsonl")


def counts(folder: Path, name: str, first: int, end: int) -> dict[str, int]:
    """Sums over the batches of some steps and both ranks."""
    ranks = json.loads((folder / f"{name}.json").read_text())["batches"]
    each = len(ranks[0]) // STEPS
    chosen = [batch for batches in ranks for batch in batches[first * each : end * each]]
    return {key: sum(batch[key] for batch in chosen) for key in chosen[0]}


@pytest.mark.parametrize("name", CASES)
def test_tokens_padding_and_rates(folder: Path, name: str) -> None:
    recipe = str(CASES[name].get("recipe", "full"))
    stage = PRETRAIN if recipe == "distill" else FINETUNE
    c = config(recipe)
    for line, (first, end) in zip(lines(folder, name), ((0, 2), (2, 4)), strict=True):
        so_far, window = counts(folder, name, 0, end), counts(folder, name, first, end)
        tokens = window["text"] + window["visual"]
        assert line["consumed tokens"] == so_far["text"] + so_far["visual"]
        assert line["consumed text tokens"] == so_far["text"]
        assert line["consumed visual tokens"] == so_far["visual"]
        trained = so_far["labels"] if stage is FINETUNE else so_far["text"] + so_far["patches"]
        assert line["consumed trained tokens"] == trained
        assert line["padding (%)"] == pytest.approx(100 * (1 - tokens / window["positions"]))
        seconds = 2 * line["elapsed time per iteration (ms)"] / 1000
        assert line["tokens per gpu per second (tgs)"] == pytest.approx(tokens / seconds / 2)
        assert line["samples per second"] == pytest.approx(2 * 4 / seconds)
        operations = training_flops(
            c.model,
            tokens=tokens,
            head_tokens=window["labels"] if stage is FINETUNE else window["text"],
            visible_pairs=window["pairs"],
            stage=stage,
            trained=trained_parts(c.recipe),
        )
        assert line["TFLOPs"] == pytest.approx(operations / seconds / 2 / 1e12)
        assert line["MFU (%)"] == pytest.approx(100 * line["TFLOPs"] / 0.5)


@pytest.mark.parametrize("name", CASES)
def test_norm_of_the_weights(folder: Path, name: str) -> None:
    expected = json.loads((folder / f"{name}.json").read_text())["norm"]
    assert lines(folder, name)[-1]["params norm"] == pytest.approx(expected, rel=1e-6)


def test_zeros_of_the_gradient(folder: Path) -> None:
    whole = json.loads((folder / "full-zero0.json").read_text())["zeros"]
    assert len(whole) == STEPS and whole[3] > 0
    for stage in range(4):
        assert [line["num zeros"] for line in lines(folder, f"full-zero{stage}")] == [whole[1], whole[3]], stage


def test_rates_of_the_parts(folder: Path) -> None:
    rates = {f"learning rate/{part}": 1e-3 for part in ("post_decoder", "pre_decoder", "embedding")}
    for line in lines(folder, "full-zero0"):
        assert {key: line[key] for key in line if key.startswith("learning rate/")} == {
            **rates,
            "learning rate/connector": 4e-3,
        }
    assert not [key for line in lines(folder, "full-zero1") for key in line if key.startswith("learning rate/")]


@pytest.mark.parametrize("name", CASES)
def test_times_and_memory(folder: Path, name: str) -> None:
    for line in lines(folder, name):
        whole = line["elapsed time per iteration (ms)"]
        assert 0 < line["loader wait (ms)"] <= line["slowest rank (ms)"] < whole
        assert line["fastest rank (ms)"] <= line["slowest rank (ms)"]
        assert {line["slowest rank"], line["fastest rank"]} <= {0, 1}
        assert 0.1 < line["peak memory (GiB)"] < 8
        assert line["number of skipped iterations"] == 0
    assert lines(folder, name)[-1]["time to the end (h)"] == 0
