"""Skipped samples: what ranks agree on, what is counted once, and when there are too many."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_haplovl.config.schema import CheckpointConfig, Config, DataConfig, ScheduleConfig
from megatron_haplovl.data.batch import IGNORE_INDEX, Batch
from megatron_haplovl.data.loader import BatchLoader, build_loader
from megatron_haplovl.data.sources import Sample
from megatron_haplovl.operation.endings import ExitCode, RunEnd
from megatron_haplovl.parallel.groups import Group
from megatron_haplovl.training.bad_samples import BadSamples
from tests.fixtures.small_prefix import SIZES, damage_image, write_small_prefix
from tests.fixtures.tiny_haplo import tiny_model


def config(folder: Path, limit: int, **schedule: Any) -> Config:
    model = dataclasses.replace(tiny_model(), vocab_size=128)
    return Config(
        model=model,
        data=DataConfig(seq_length=64, num_workers=0, data_cache_path=str(folder / "cache"), skip_bad_samples=limit),
        schedule=ScheduleConfig(**{"global_batch_size": 4, "micro_batch_size": 1} | schedule),
        checkpoint=CheckpointConfig(save=str(folder / "run")),
    )


def make_loader(prefix: str, c: Config, steps: int = 6, **options: Any) -> BatchLoader:
    return build_loader((prefix,), c, num_steps=steps, **{"dp_rank": 0, "dp_size": 1} | options)


def counted(batches: list[Batch]) -> dict[str, int]:
    """What a step's losses are divided by, from the batches themselves."""
    newlines = sum(len(batch.newline_target_N) for batch in batches)
    text, patches = (
        sum(int(batch.text_mask_BS.sum()) for batch in batches),
        sum(len(batch.patch_target_P) for batch in batches),
    )
    return {
        "lm_tokens": sum(int((batch.labels_BS != IGNORE_INDEX).sum()) for batch in batches),
        "text_tokens": text,
        "patch_tokens": patches,
        "tokens": text + patches + newlines,
    }


@pytest.mark.parametrize("unit", ["packs", "samples"])
@pytest.mark.parametrize("aux", [False, True])
def test_counts_are_those_of_what_was_read(tmp_path: Path, unit: str, aux: bool, log_lines: list[str]) -> None:
    prefix = write_small_prefix(tmp_path)
    damage_image(prefix, 3)
    (tmp_path / "aux").mkdir()
    paths = (write_small_prefix(tmp_path / "aux"),) if aux else ()
    c = config(tmp_path, 1, batch_unit=unit)
    loader = make_loader(prefix, c, aux_paths=paths)
    planned = [loader.counts(step) for step in range(6)]
    by_source = loader.counts_by_source(range(6))
    bad, batches, read = BadSamples(c, Group()), loader.micro_batches(), []
    for step in range(6):
        read.append(list(bad.settle(loader, batches, loader.micro_batches_of(step), step)))
        left = vars(loader.counts(step))
        assert {name: left[name] for name in counted(read[-1])} == counted(read[-1])
    met = [gap for step in read for batch in step for gap in batch.gaps]
    assert met and loader.counts_before(6).tokens == sum(loader.counts(step).tokens for step in range(6))
    assert loader.counts_before(6).tokens < sum(counts.tokens for counts in planned)
    missing = sum(len(gap.documents) for gap in met)
    assert loader.counts_before(6).documents == sum(counts.documents for counts in planned) - missing
    left_by_source = by_source - loader.counts_by_source(range(6))
    assert left_by_source[0, 0] == missing and (left_by_source[1:, 0] <= missing).all()
    assert bad.columns() == {"number of skipped samples": 1}
    assert sum(f"skipped {prefix} sample 3 after step" in line for line in log_lines) == 1
    (line,) = (tmp_path / "run/debug/bad_samples.jsonl").read_text().splitlines()
    assert json.loads(line)["prefix"] == prefix and json.loads(line)["sample"] == 3


def test_without_the_flag_the_first_one_ends_the_run(tmp_path: Path) -> None:
    prefix = write_small_prefix(tmp_path)
    damage_image(prefix, 3)
    c = config(tmp_path, 0)
    loader = make_loader(prefix, c)
    batches = loader.micro_batches()
    assert BadSamples(c, Group()).settle(loader, batches, 4, 0) is batches
    assert BadSamples(c, Group()).columns() == {}
    with pytest.raises(ValueError, match=rf"^{prefix} sample 3: "):
        list(batches)


def test_too_many(tmp_path: Path) -> None:
    prefix = write_small_prefix(tmp_path)
    for image in range(len(SIZES)):
        damage_image(prefix, image)
    c = config(tmp_path, 2)
    loader = make_loader(prefix, c)
    bad, batches = BadSamples(c, Group()), loader.micro_batches()
    with pytest.raises(RunEnd, match="3 samples cannot be read, more than --skip-bad-samples 2: .*Preprocess") as end:
        for step in range(6):
            bad.settle(loader, batches, 4, step)
    assert end.value.ending.code == ExitCode.NEEDS_PERSON
    assert all(f"{prefix} sample {sample} (" in str(end.value) for sample in (0, 2, 3))
    state = json.loads(json.dumps(bad.state(loader)))
    with pytest.raises(ValueError, match="3 samples cannot be read, more than --skip-bad-samples 2"):
        BadSamples(c, Group()).resume(state, make_loader(prefix, c), tmp_path)


def test_a_resumed_run_knows_what_was_skipped(tmp_path: Path, log_lines: list[str]) -> None:
    prefix = write_small_prefix(tmp_path)
    damage_image(prefix, 3)
    c = config(tmp_path, 1)
    loader, bad = make_loader(prefix, c), BadSamples(c, Group())
    batches = loader.micro_batches()
    for step in range(6):
        bad.settle(loader, batches, 4, step)
    state = json.loads(json.dumps(bad.state(loader)))
    log_lines.clear()
    again, resumed = make_loader(prefix, c), BadSamples(c, Group())
    resumed.resume(state, again, tmp_path)
    assert again.counts_before(6) == loader.counts_before(6) != make_loader(prefix, c).counts_before(6)
    resumed.settle(again, again.micro_batches(3), 12, 3)
    assert resumed.columns() == bad.columns() and not any("skipped" in line for line in log_lines)
    resumed.resume({}, again, tmp_path)  # of an older version
    for damaged in ({"bad_samples": 3}, {"bad_samples": [["a"]]}, {"gaps": [{"pack": 1}]}, {"gaps": {"a": 1}}):
        with pytest.raises(ValueError, match="is damaged: what it says of skipped samples"):
            resumed.resume(damaged, again, tmp_path)


class _Ranks:
    """Groups of threads that stand for ranks. One runs at a time, because threads share what processes do not, such as
    the filters of warnings, which decoding an image sets."""

    def __init__(self, size: int) -> None:
        self.size, self._barrier = size, threading.Barrier(size, timeout=60)
        self._turn = threading.Lock()
        self._slots: list[Any] = [None] * size

    def exchange(self, rank: int, mine: Any) -> list[Any]:
        self._slots[rank] = mine
        self._meet()
        found = list(self._slots)
        self._meet()
        return found

    def _meet(self) -> None:
        self._turn.release()
        try:
            self._barrier.wait()
        finally:
            self._turn.acquire()

    def run(self, program: Callable[[Group], Any]) -> list[Any]:
        groups = [_ThreadGroup(rank, self.size, ranks=tuple(range(self.size))) for rank in range(self.size)]
        for group in groups:
            object.__setattr__(group, "exchange", self.exchange)

        def ranked(group: _ThreadGroup) -> Any:
            with self._turn:
                try:
                    return program(group)
                except Exception:
                    self._barrier.abort()  # The others would wait for this one.
                    raise

        with ThreadPoolExecutor(self.size) as pool:
            futures = [pool.submit(ranked, group) for group in groups]
        failed = [future.exception() for future in futures if future.exception() is not None]
        # A rank that only waited for another one says nothing of the cause.
        for error in sorted(failed, key=lambda error: isinstance(error, threading.BrokenBarrierError))[:1]:
            assert error is not None
            raise error
        return [future.result() for future in futures]


class _ThreadGroup(Group):
    exchange: Callable[[int, Any], list[Any]]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.exchange(self.rank, tensor.clone())).sum(0)

    def gather_objects(self, mine: Any) -> list[Any]:
        return self.exchange(self.rank, mine)


def test_ranks_that_share_a_pack_leave_out_the_same(tmp_path: Path) -> None:
    """Two data-parallel pairs, of which one rank alone fails to read a sample, and two ranks without any data."""
    prefix = write_small_prefix(tmp_path)
    c = config(tmp_path, 2)
    make_loader(prefix, c)  # builds the plan

    def program(group: Group):
        loader = make_loader(prefix, c, dp_rank=group.rank % 2, dp_size=2, is_builder=False)
        if group.rank in (1, 2):
            fail_once(loader, {1: 3, 2: 0}[group.rank])
        bad = BadSamples(c, group)
        batches = iter(()) if group.rank >= 4 else loader.micro_batches()
        found = [
            (list(bad.settle(loader, batches, loader.micro_batches_of(step), step)), loader.counts(step))
            for step in range(3)
        ]
        return found, bad.columns(), loader.counts_before(3), loader.counts_by_source(range(3)).tolist()

    results = _Ranks(6).run(program)
    assert {columns["number of skipped samples"] for _, columns, *_ in results} == {2}
    assert all(result[2:] == results[0][2:] for result in results)
    for step in range(3):
        of_ranks = [found[step][0] for found, *_ in results]
        for rank in range(2):
            for ours, theirs in zip(of_ranks[rank], of_ranks[rank + 2], strict=True):
                assert torch.equal(ours.tokens_BS, theirs.tokens_BS) and ours.packs == theirs.packs
        whole = counted([*of_ranks[0], *of_ranks[1]])
        for found, *_ in results:
            assert {name: vars(found[step][1])[name] for name in whole} == whole


def fail_once(loader: BatchLoader, sample: int) -> None:
    """The first time that it is read, a sample cannot be, as on a network file system that stumbles."""
    (source,) = loader._dataset._sources
    read, failed = source.read, list[int]()

    def failing(index: int) -> Sample:
        if index == sample and not failed:
            failed.append(index)
            raise ValueError("stumbled")
        return read(index)

    source.read = failing  # type: ignore[method-assign]
