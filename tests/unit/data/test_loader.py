"""The loader: which packs go where, exact resuming, and data that does not fit the run."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_haplovl.config.schema import Config, DataConfig, ModelConfig, ParallelConfig, RunConfig, ScheduleConfig
from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data.batch import IGNORE_INDEX, Batch
from megatron_haplovl.data.loader import BatchLoader, build_loader, parse_blend, shortest_length
from megatron_haplovl.data.plan.dealing import EMPTY
from megatron_haplovl.data.sources import EncodedImage, IndexedSource
from tests.conftest import train_sentencepiece

VISION = VisionConfig(patch_size=8, image_size=16, image_aspect_ratio="anyres", max_tiles=4, image_newline=True)


def make_config(cache: Path | None, **changes: Any) -> Config:
    data: dict[str, Any] = {
        "seq_length": 160,
        "num_workers": 0,
        "data_cache_path": None if cache is None else str(cache),
    }
    data.update({name: value for name, value in changes.items() if hasattr(DataConfig, name)})
    schedule: dict[str, Any] = {"global_batch_size": 4, "micro_batch_size": 2}
    schedule.update({name: value for name, value in changes.items() if hasattr(ScheduleConfig, name)})
    return Config(
        model=ModelConfig(vocab_size=changes.get("vocab_size", 500), vision=VISION),
        data=DataConfig(**data),
        schedule=ScheduleConfig(**schedule),
    )


def make_loader(prefix: str, config: Config, *, num_steps: int = 9, **options: Any) -> BatchLoader:
    options = {"dp_rank": 0, "dp_size": 1, **options}
    return build_loader((prefix,), config, num_steps=num_steps, **options)


def same(a: Batch, b: Batch) -> bool:
    def equal(ours: object, theirs: object) -> bool:
        if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
            return torch.equal(ours, theirs)
        return ours == theirs

    return all(equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Batch))


def rows(batches: Iterator[Batch]) -> list[tuple[int, ...]]:
    """The sequences of all batches."""
    return [tuple(row) for batch in batches for row in batch.tokens_BS.tolist()]


@pytest.mark.parametrize("unit", ["packs", "samples"])
def test_packs_of_a_step_do_not_depend_on_the_layout(tiny_prefix: str, tmp_path: Path, unit: str) -> None:
    """One rank reads the plan in order; several read the same sequences in every step, each of them once."""
    one = make_loader(tiny_prefix, make_config(tmp_path, micro_batch_size=1, batch_unit=unit))
    expected = rows(one.micro_batches())
    assert len(expected) == 9 * one.sequences and (one.sequences == 4) == (unit == "packs")
    for size, micro in ((1, 4), (1, 2), (2, 1), (2, 2), (4, 1)):
        config = make_config(tmp_path, micro_batch_size=micro, batch_unit=unit)
        loaders = [make_loader(tiny_prefix, config, dp_rank=r, dp_size=size) for r in range(size)]
        assert len({loader.plan_key for loader in (one, *loaders)}) == 1
        per_rank = loaders[0].micro_batches_of(0) * micro
        ranks = [rows(loader.micro_batches()) for loader in loaders]
        assert {len(rank) for rank in ranks} == {9 * per_rank}
        for step in range(9):
            wanted = Counter(filter(any, expected[step * one.sequences : (step + 1) * one.sequences]))
            got = [row for rank in ranks for row in rank[step * per_rank : (step + 1) * per_rank] if any(row)]
            assert Counter(got) == wanted and len(got) > 0
            assert size > 1 or got == list(wanted.elements())


@pytest.mark.parametrize("unit", ["packs", "samples"])
def test_a_batch_names_its_packs_and_a_step_its_sources(tiny_prefix: str, tmp_path: Path, unit: str) -> None:
    config = make_config(tmp_path, micro_batch_size=1, batch_unit=unit)
    for rank in range(2):
        loader = make_loader(tiny_prefix, config, aux_paths=(tiny_prefix,), dp_rank=rank, dp_size=2)
        assert len(loader.source_names) == 2
        batches = list(loader.micro_batches())
        of_batches = [pack for batch in batches for pack in batch.packs]
        assert of_batches == [pack for step in range(9) for pack in loader._sampler.packs_of(step)]
        assert set(of_batches) - {EMPTY} and (unit == "samples" or EMPTY not in of_batches)
        per_step = loader.micro_batches_of(0)
        for step in range(9):
            of_step = batches[step * per_step : (step + 1) * per_step]
            numbers = {int(n) for b in of_step if b.source_BS is not None for n in b.source_BS.unique()} - {-1}
            assert loader.describe_step(step) == tuple(loader.source_names[number] for number in sorted(numbers))
            names = ", ".join(loader.describe_step(step))
            assert loader.describe(1, (step - 1) * per_step) == f"step {step + 1}, source {names}"
        assert all(torch.equal(loader.packs(b.packs).tokens_BS, b.tokens_BS) for b in batches)


def test_counts_are_those_of_the_batches(tiny_prefix: str, tmp_path: Path) -> None:
    for aux in ((), (tiny_prefix,)):
        loader = make_loader(tiny_prefix, make_config(tmp_path), aux_paths=aux)
        batches = list(loader.micro_batches())
        for step in range(loader.steps_available):
            counts, two = loader.counts(step), batches[2 * step : 2 * step + 2]
            assert counts.lm_tokens == sum(int((b.labels_BS != IGNORE_INDEX).sum()) for b in two) > 0
            assert counts.text_tokens == sum(int(b.text_mask_BS.sum()) for b in two)
            assert counts.patch_tokens == sum(len(b.patch_source_P) for b in two)
            newlines = sum(len(b.newline_target_N) for b in two)
            assert counts.tokens == counts.text_tokens + counts.patch_tokens + newlines
            padding = sum(int(((b.kv_end_BS - b.kv_start_BS == 1) & ~b.text_mask_BS).sum()) for b in two)
            assert counts.tokens == 4 * 160 - padding
            # Every document has one position 0, at its start, and every padding position is 0, too.
            assert counts.documents == sum(int((b.position_ids_BS == 0).sum()) for b in two) - padding


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_batches_are_bit_identical(tiny_prefix: str, tmp_path: Path, num_workers: int) -> None:
    whole = list(make_loader(tiny_prefix, make_config(tmp_path)).micro_batches())
    config = make_config(tmp_path, num_workers=num_workers)
    resumed = make_loader(tiny_prefix, config, num_steps=9)
    for first in (7, 4):  # the second time while the first iterator is unfinished
        batches = resumed.micro_batches(first)
        for expected in whole[2 * first : 2 * first + 3]:
            assert same(next(batches), expected)
    assert len(list(resumed.micro_batches(8))) == 2


def test_a_longer_run_begins_like_a_shorter_one(tiny_prefix: str, tmp_path: Path) -> None:
    short = list(make_loader(tiny_prefix, make_config(tmp_path), num_steps=2).micro_batches())
    long = make_loader(tiny_prefix, make_config(tmp_path / "other"), num_steps=30).micro_batches()
    assert all(same(a, next(long)) for a in short)


def test_reading_leaves_the_global_random_state_alone(tiny_prefix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    next(make_loader(tiny_prefix, make_config(tmp_path, num_workers=1)).micro_batches())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_evaluation_reads_every_sample_once(tiny_prefix: str, tmp_path: Path) -> None:
    config = make_config(tmp_path, packing=False)
    loader = make_loader(tiny_prefix, config, num_steps=100, shuffle=False)
    assert loader.steps_available == 6  # 24 samples, 4 in a batch
    texts = [row for row in rows(loader.micro_batches()) if any(row)]
    assert len(texts) == 24
    loader = make_loader(
        tiny_prefix, make_config(tmp_path, packing=False, global_batch_size=10), num_steps=100, shuffle=False
    )
    assert loader.steps_available == 3
    again = rows(loader.micro_batches())
    assert [row for row in again if any(row)] == texts
    assert len(again) == 30 and loader.counts(2).documents == 4
    assert make_loader(tiny_prefix, config, num_steps=2, shuffle=False).steps_available == 2


def test_plan_is_cached_beside_the_data(tiny_prefix: str, tmp_path: Path, log_lines: list[str]) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(Path(tiny_prefix).parent, folder)
    prefix = str(folder / "train")
    first = rows(make_loader(prefix, make_config(None)).micro_batches())
    assert any("built epoch 0" in line for line in log_lines)
    assert len(list((folder / "pack_plan_cache").iterdir())) == 1
    log_lines.clear()
    waited: list[int] = []
    # Another rank builds nothing, and waits.
    second = make_loader(prefix, make_config(None), dp_rank=0, is_builder=False, barrier=lambda: waited.append(1))
    assert rows(second.micro_batches()) == first
    assert not any("built" in line for line in log_lines) and waited == [1]
    make_loader(prefix, make_config(None, seq_length=200))
    assert len(list((folder / "pack_plan_cache").iterdir())) == 2
    assert not list((folder / "pack_plan_cache").rglob(".*"))


def test_rank_without_a_plan_says_what_is_wrong(tiny_prefix: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--data-cache-path must be shared"):
        make_loader(tiny_prefix, make_config(tmp_path), is_builder=False, barrier=lambda: None)


def test_damaged_cache(tiny_prefix: str, tmp_path: Path) -> None:
    make_loader(tiny_prefix, make_config(tmp_path))
    items = next(tmp_path.rglob("epoch_00000/items.npy"))
    items.write_bytes(items.read_bytes()[:100])
    with pytest.raises(ValueError, match="cached pack plan .*epoch_00000 is damaged"):
        make_loader(tiny_prefix, make_config(tmp_path))


def test_mock_data_needs_no_files() -> None:
    config = make_config(None, mock_data=True)
    loader = build_loader((), config, num_steps=2000, dp_rank=0, dp_size=1)
    assert loader.steps_available == 2000
    first = list(zip(range(6), loader.micro_batches(), strict=False))
    again = loader.micro_batches(1)
    assert all(same(b, next(again)) for i, b in first if i >= 2)
    assert loader.counts(1999).lm_tokens > 0
    held_out = build_loader((), config, num_steps=2, dp_rank=0, dp_size=1, shuffle=False)
    assert not same(next(held_out.micro_batches()), first[0][1])


def test_other_tokenizer(tiny_prefix: str, tiny_spm_model: Path, tmp_path: Path) -> None:
    make_loader(tiny_prefix, make_config(tmp_path, tokenizer_model=str(tiny_spm_model)))
    other = train_sentencepiece(tmp_path, vocab_size=400)
    with pytest.raises(ValueError, match=r"train was preprocessed with another tokenizer .* than --tokenizer-model"):
        make_loader(tiny_prefix, make_config(tmp_path, tokenizer_model=str(other)))


def test_fingerprint_of_the_old_kind(
    tiny_prefix: str, tiny_spm_model: Path, tmp_path: Path, log_lines: list[str]
) -> None:
    """Data that was preprocessed before is read, and the log says what cannot be compared."""
    shutil.copytree(Path(tiny_prefix).parent, tmp_path / "copy")
    manifest = tmp_path / "copy" / "train.manifest.json"
    fields = json.loads(manifest.read_text())
    fields["tokenizer_fingerprint"] = fields["tokenizer_fingerprint"].split(":")[1]
    del fields["content_hash"]  # which was not written then
    manifest.write_text(json.dumps(fields))
    old = str(tmp_path / "copy" / "train")
    make_loader(tiny_prefix, make_config(None, tokenizer_model=str(tiny_spm_model)))
    assert not any("old kind" in line for line in log_lines)
    make_loader(old, make_config(None, tokenizer_model=str(tiny_spm_model)))
    assert sum(f"{old}: its tokenizer fingerprint is of the old kind" in line for line in log_lines) == 1
    other = train_sentencepiece(tmp_path, vocab_size=400)
    with pytest.raises(ValueError, match=r"was preprocessed with another tokenizer"):
        make_loader(old, make_config(None, tokenizer_model=str(other)))


def test_token_id_outside_the_vocabulary(tiny_prefix: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"contains the token id \d+, outside of --vocab-size 100"):
        make_loader(tiny_prefix, make_config(tmp_path, vocab_size=100))


def test_sample_longer_than_the_sequence(tiny_prefix: str, tmp_path: Path, log_lines: list[str]) -> None:
    with pytest.raises(ValueError, match=r"train: sample \d+ has \d+ tokens, more than --seq-length 70"):
        make_loader(tiny_prefix, make_config(tmp_path, seq_length=70))
    make_loader(tiny_prefix, make_config(tmp_path, seq_length=70, skip_long_samples=True))
    assert any("samples left out, longer than 70 tokens" in line for line in log_lines)


@pytest.mark.parametrize("suffix", [".bin", "_images.bin", "_loss_mask.idx", "_image_sizes.npy"])
def test_truncated_file(tiny_prefix: str, tmp_path: Path, suffix: str) -> None:
    shutil.copytree(Path(tiny_prefix).parent, tmp_path / "copy")
    file = tmp_path / "copy" / f"train{suffix}"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=f"train{suffix} is truncated: it has"):
        make_loader(str(tmp_path / "copy" / "train"), make_config(None))
    file.unlink()
    with pytest.raises(ValueError, match=f"train{suffix} is missing"):
        make_loader(str(tmp_path / "copy" / "train"), make_config(None))


def test_files_of_other_data(tiny_prefix: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.manifest\.json does not exist"):
        make_loader(str(tmp_path / "absent"), make_config(tmp_path))
    (tmp_path / "x.manifest.json").write_text('{"format_version": 1}')
    with pytest.raises(ValueError, match="is not a manifest"):
        make_loader(str(tmp_path / "x"), make_config(tmp_path))


def test_batch_sizes_that_do_not_divide(tiny_prefix: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="--global-batch-size 4 is not a multiple of --micro-batch-size 2 x 3 data-parallel ranks"
    ):
        make_loader(tiny_prefix, make_config(tmp_path), dp_size=3)


def test_blend() -> None:
    assert parse_blend(("a",)) == [(1.0, "a")]
    assert parse_blend(("0.3", "a", "2", "b")) == [(0.3, "a"), (2.0, "b")]
    for paths, message in (
        (("a", "b"), "'a' before 'b' is not a weight"),
        (("1", "a", "b"), "must be one prefix or pairs"),
        (("0", "a"), "must be positive"),
        (("nan", "a"), "must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_blend(paths)


@pytest.mark.parametrize("version", [1, 2])
def test_only_prefixes_of_format_2_hold_sizes_of_upright_pictures(
    tiny_prefix: str, tmp_path: Path, version: int
) -> None:
    for path in Path(tiny_prefix).parent.glob("train*"):
        shutil.copy(path, tmp_path / path.name)
    manifest = tmp_path / "train.manifest.json"
    fields = json.loads(manifest.read_text()) | {"format_version": version}
    del fields["content_hash"]  # that of version 2
    manifest.write_text(json.dumps(fields))
    (image,) = IndexedSource(str(tmp_path / "train")).read(0).visuals
    assert isinstance(image, EncodedImage) and image.upright == (version == 2)


def test_batches_are_pinned_where_there_is_a_gpu(
    tiny_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for gpu, device, pinned in ((True, "auto", True), (True, "cpu", False), (False, "auto", False)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        config = dataclasses.replace(make_config(tmp_path, num_workers=1), run=RunConfig(device=device))
        loader = make_loader(tiny_prefix, config)._loader
        assert loader.pin_memory == pinned
        assert loader.prefetch_factor == 4
    assert make_loader(tiny_prefix, make_config(tmp_path))._loader.prefetch_factor is None


def test_batches_in_samples(tiny_prefix: str, tmp_path: Path) -> None:
    """Exactly as many samples in every step; micro-batches without any are as short as the layout allows."""
    config = make_config(tmp_path, batch_unit="samples", global_batch_size=7, micro_batch_size=1)
    loaders = [make_loader(tiny_prefix, config, dp_rank=rank, dp_size=3) for rank in range(3)]
    assert {loader.counts(step).documents for loader in loaders for step in range(9)} == {7}
    assert loaders[0].counts_before(5).tokens == sum(loaders[0].counts(step).tokens for step in range(5))
    batches = [batch for loader in loaders for batch in loader.micro_batches()]
    assert {batch.tokens_BS.shape[1] for batch in batches} == {1, 160}
    for parallel, length in (
        (ParallelConfig(context_parallel_size=2), 2),
        (ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2), 4),
        (ParallelConfig(tensor_model_parallel_size=2), 1),
        (ParallelConfig(pipeline_model_parallel_size=2), 160),
    ):
        assert shortest_length(dataclasses.replace(config, parallel=parallel)) == length


def test_evaluation_in_samples_reads_every_sample_once(tiny_prefix: str, tmp_path: Path) -> None:
    config = make_config(tmp_path, batch_unit="samples", global_batch_size=10, micro_batch_size=1)
    loader = make_loader(tiny_prefix, config, num_steps=100, shuffle=False)
    assert loader.steps_available == 3
    assert [loader.counts(step).documents for step in range(3)] == [10, 10, 4]
    assert loader.counts_before(3).documents == 24


def test_what_workers_are_sent_does_not_grow_with_the_data(tiny_prefix: str, tmp_path: Path) -> None:
    """Sources and planned epochs travel as paths, and read the same on the other side."""
    loader = make_loader(tiny_prefix, make_config(tmp_path))
    sent = pickle.dumps(loader._loader.dataset)
    epoch, source = loader._plan.packs.epochs[0], IndexedSource(tiny_prefix)
    for kept in (epoch.items, epoch.cumulative, source._image_sizes_I2.all()):
        assert kept.tobytes() not in sent
    assert same(pickle.loads(sent)[[0, 3]], loader.packs([0, 3]))
    assert pickle.loads(pickle.dumps(source)).read(0).visuals == source.read(0).visuals
