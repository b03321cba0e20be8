"""How many checkpoints of what size a run will have at once, beside a simulation and real files."""

from __future__ import annotations

import errno
import itertools
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_haplovl.checkpoint.pieces import MOMENTS, WEIGHT, Piece
from megatron_haplovl.checkpoint.space import Keeping, checkpoint_bytes, free_bytes, gigabytes
from megatron_haplovl.checkpoint.state import TrainingState
from megatron_haplovl.checkpoint.write import (
    complete,
    mark_failed,
    prepare,
    publish,
    settings_texts,
    write_rank,
    write_settings,
)
from megatron_haplovl.config.schema import Config


def folders_at_once(root, keeping, first, last, there):
    """The largest number of folders while a run's saves are really published, one after the other."""
    for step in there:
        (root / f"global_step{step}").mkdir()
        (root / f"global_step{step}" / "manifest.json").touch()
    most = len(there)
    for step in range(first + 1, last + 1):
        if step == last or (keeping.interval is not None and step % keeping.interval == 0):
            folder = root / f"global_step{step}"
            aside = folder.with_name("aside")
            aside.mkdir()
            (aside / "manifest.json").touch()
            most = max(most, len(list(root.glob("global_step*"))) + 1)
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
            publish(folder, keeping.keep_last, keeping.keep_every)
    return most


@pytest.mark.parametrize("keep", [(None, None), (1, None), (2, None), (2, 6), (3, 4), (1, 5)])
@pytest.mark.parametrize("interval", [None, 1, 2, 3])
def test_as_many_as_really_lie_there(tmp_path, interval, keep):
    keeping = Keeping(interval, *keep)
    for i, (first, there) in enumerate(itertools.product((0, 7), ([], [2, 4, 6], [4, 6, 7, 14]))):
        (tmp_path / str(i)).mkdir()
        expected = folders_at_once(tmp_path / str(i), keeping, first, 20, there)
        assert keeping.most_at_once(first, 20, there) == expected, (first, there)


def test_a_run_of_forty_thousand_steps():
    assert Keeping(1000, None, None).most_at_once(0, 40_000, []) == 40
    assert Keeping(1000, 2, 10_000).most_at_once(0, 40_000, []) == 6
    assert Keeping(None, None, None).most_at_once(0, 40_000, []) == 1


@pytest.mark.parametrize(("ranks", "tensor_ranks"), [(1, 1), (2, 1), (4, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_size_of_a_checkpoint(tmp_path, dtype, ranks, tensor_ranks):
    """The sizes are those of a debug model: a header weighs a few percent there, and nothing where it matters."""
    shapes = {f"post_decoder.{i}.mlp.up_proj.weight": torch.Size((64, 96)) for i in range(12)}
    shapes |= {f"pre_decoder.{i}.norm.bias": torch.Size((64,)) for i in range(6)}
    trained = [name for name in shapes if name.startswith("post")]
    aside = tmp_path / "aside"
    aside.mkdir()
    write_settings(aside, *settings_texts(Config(), TrainingState(1, 4, "0" * 64, "0" * 12)))
    replicas = ranks // tensor_ranks
    for rank in range(ranks):
        part, replica = rank % tensor_ranks, rank // tensor_ranks
        pieces = []
        for name, shape in shapes.items():
            if name not in trained and rank > 0:
                continue
            divided = name in trained and tensor_ranks > 1
            for kind in (WEIGHT, *MOMENTS) if name in trained else (WEIGHT,):
                size = shape.numel() // (tensor_ranks if divided else 1)
                length = size // replicas if name in trained else size
                place: tuple[Any, int, int] = (0, part, tensor_ranks) if divided else (None, 0, 1)
                start = replica * length if name in trained else 0
                values = torch.zeros(length, dtype=torch.float32 if name in trained else dtype)
                pieces.append((Piece(name, kind, *place, start, length), values))
        write_rank(aside, rank, pieces, "0" * 12)
    complete(aside, tmp_path / "step", ranks, shapes, dtype, patience=1.0, run_id="0" * 12)
    real = sum(path.stat().st_size for path in (tmp_path / "step").iterdir())
    assert checkpoint_bytes(shapes, trained, dtype, ranks, tensor_ranks) == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize(
    ("size", "words"), [(85 * 10**9, "85 GB"), (1.234e12, "1.23 TB"), (9_889_320, "9.89 MB"), (512, "0.512 kB")]
)
def test_sizes_in_words(size, words):
    assert gigabytes(size) == words


def test_a_file_system_that_knows_no_size_is_not_full(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=0, used=0, free=0))
    assert free_bytes(tmp_path) > 10**15


def test_nothing_is_begun_that_does_not_fit(tmp_path):
    aside = tmp_path / ".global_step7.unfinished"
    with pytest.raises(OSError, match="a checkpoint takes .* are free") as refused:
        prepare(aside, Config(), TrainingState(7, 4, "a plan", "a run"), needs=1 << 60)
    assert refused.value.errno == errno.ENOSPC and not aside.exists()


def test_a_failed_rank_gives_its_space_back(tmp_path):
    for name in ("rank-00001.safetensors", "unfinished-rank-00001.json", "rank-00000.safetensors"):
        (tmp_path / name).write_bytes(b"x" * 1000)
    mark_failed(tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"rank-00001.failed", "rank-00000.safetensors"}
