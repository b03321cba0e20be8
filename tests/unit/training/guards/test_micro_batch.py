"""A micro-batch by name, read once more and kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_haplovl.config.cli import build_config
from megatron_haplovl.data.loader import BatchLoader, build_loader
from megatron_haplovl.parallel.groups import ParallelGroups
from megatron_haplovl.training.guards import micro_batch
from megatron_haplovl.training.guards.micro_batch import MicroBatchName, StepData


def loader(**data: Any) -> BatchLoader:
    settings: dict[tuple[str, ...], Any] = {
        ("data", "mock_data"): True,
        ("data", "num_workers"): 0,
        ("data", "seq_length"): 256,
        ("schedule", "global_batch_size"): 6,
        ("schedule", "micro_batch_size"): 2,
        **{("data", key): value for key, value in data.items()},
    }
    return build_loader((), build_config("finetune", "haplovl-debug", settings), num_steps=4, dp_rank=0, dp_size=1)


def test_the_samples_are_those_that_the_plan_puts_there() -> None:
    batches = loader()
    data = StepData(batches, ParallelGroups(), reads_data=True)
    name = data.name(2, 1, 0)
    assert (name.step, name.index, name.number, name.rank) == (3, 1, 3, 0)
    assert name.packs == (14, 15)
    planned = [sample for pack in name.packs for document in batches.plan.documents(pack) for _, sample in document]
    assert name.samples == tuple(("mock data", sample) for sample in planned)
    # Read once more, it is what the loop has read.
    everything = list(batches.micro_batches(0))
    for index, again in enumerate(data.read(2)):
        assert torch.equal(again.tokens_BS, everything[6 + index].tokens_BS)
    (alone,) = data.read(2, 1)
    assert torch.equal(alone.tokens_BS, everything[7].tokens_BS)
    assert list(StepData(batches, ParallelGroups(), reads_data=False).read(2)) == []


def test_a_sentence_names_some_and_the_file_all(tmp_path: Path) -> None:
    batches = loader()
    data = StepData(batches, ParallelGroups(), reads_data=True)
    name = data.name(0, 0, 0)
    said = data.keep(name, tmp_path / "debug", {"reason": "a test"})
    path = tmp_path / "debug" / "step1-rank0-micro-batch1.safetensors"
    assert said == f"the micro-batch is in {path}"
    kept, (batch,) = load_file(path), data.read(0, 0)
    for key, value in kept.items():
        assert torch.equal(value, getattr(batch, key)), key
    assert {"tokens_BS", "labels_BS", "tiles_TCHW", "kv_end_BS"} <= kept.keys()
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["reason"] == "a test"
    assert [(sample["prefix"], sample["sample"]) for sample in record["samples"]] == list(name.samples)
    many = MicroBatchName(1, 0, 2, 3, "host", 0, (0,), tuple(("a" if n < 5 else "b", n) for n in range(10)))
    assert many.words == ("rank 3 on host, micro-batch 1 of 2 (a sample 0, 1, 2, 3, 4; b sample 5, 6, 7 and 2 more)")
    assert MicroBatchName(1, 0, 2, 3, "host", 0, (-1,), ()).words.endswith("(without samples)")


def test_what_cannot_be_kept_is_said_and_a_folder_does_not_grow_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = StepData(loader(), ParallelGroups(), reads_data=True)
    (tmp_path / "file").touch()
    assert data.keep(data.name(0, 0, 0), tmp_path / "file" / "debug", {}).startswith(
        "the micro-batch could not be kept ("
    )
    monkeypatch.setattr(micro_batch, "_KEPT", 2)
    said = [data.keep(data.name(0, index, 0), tmp_path, {}) for index in (0, 1, 2, 1)]
    assert said[2] == f"the micro-batch is not kept, because {tmp_path} has 2 of them; delete some"
    assert said[1] == said[3]
