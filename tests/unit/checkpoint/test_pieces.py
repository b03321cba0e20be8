"""Pieces of tensors: written under one layout, read under others; damage is found."""

from __future__ import annotations

import itertools
import shutil
import stat

import pytest
import torch

from megatron_haplovl.checkpoint.manifest import MANIFEST, damaged_files
from megatron_haplovl.checkpoint.pieces import MOMENTS, WEIGHT, Piece, PieceReader, open_checkpoint
from megatron_haplovl.checkpoint.weight_files import write_weights
from megatron_haplovl.checkpoint.write import complete, mark_failed, write_rank

SHAPES = {"rows": torch.Size((8, 3)), "columns": torch.Size((3, 8)), "whole": torch.Size((5,))}
DIMS = {"rows": 0, "columns": 1, "whole": None}


def tensors():
    generator = torch.Generator().manual_seed(0)
    kinds = (WEIGHT, *MOMENTS)
    return {(n, k): torch.randn(SHAPES[n], generator=generator) for n, k in itertools.product(SHAPES, kinds)}


def held(parts, replicas):
    """What each of `parts` tensor-parallel ranks times `replicas` ranks holds, as ZeRO cuts it."""
    for part, replica in itertools.product(range(parts), range(replicas)):
        pieces = []
        for (name, kind), tensor in tensors().items():
            dim = DIMS[name] if parts > 1 else None
            if dim is None and part > 0:
                continue
            mine = (tensor if dim is None else tensor.chunk(parts, dim)[part]).reshape(-1)
            size = -(-mine.numel() // replicas)
            values = mine[replica * size : (replica + 1) * size]
            place = (dim, 0 if dim is None else part, 1 if dim is None else parts, replica * size, values.numel())
            if values.numel():
                pieces.append((Piece(name, kind, *place), values.clone()))
        yield pieces


def save(folder, parts, replicas, dtype=torch.float32):
    aside = folder / "aside"
    aside.mkdir()
    ranks = list(held(parts, replicas))
    for rank, pieces in enumerate(ranks):
        write_rank(aside, rank, pieces, "a run")
    complete(aside, folder / "step", len(ranks), SHAPES, dtype, patience=1.0, run_id="a run")
    return folder / "step"


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_any_ranks_read_what_any_ranks_wrote(tmp_path, parts, replicas):
    reader = PieceReader(save(tmp_path, parts, replicas))
    for (name, kind), tensor in tensors().items():
        assert torch.equal(reader.get(name, kind), tensor)
    for other_parts, other_replicas in itertools.product((1, 2, 4), (1, 2, 5)):
        for piece, values in itertools.chain(*held(other_parts, other_replicas)):
            assert torch.equal(reader.read(piece), values), piece
    assert (reader.names(), reader.shape("rows")) == (sorted(SHAPES), (8, 3))


def test_weights_come_in_the_models_number_format(tmp_path):
    reader = open_checkpoint(save(tmp_path, 2, 1, torch.bfloat16))
    assert torch.equal(reader.get("rows"), tensors()["rows", WEIGHT].bfloat16())
    write_weights({"a": torch.ones(2)}, tmp_path / "plain")
    assert torch.equal(open_checkpoint(tmp_path / "plain").get("a"), torch.ones(2))


def test_files_have_the_modes_that_the_user_wants(tmp_path):
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in save(tmp_path, 2, 2).iterdir()}
    (tmp_path / "new").touch()
    assert set(files.values()) == {stat.S_IMODE((tmp_path / "new").stat().st_mode)}


def test_nothing_but_safetensors_and_json(tmp_path):
    folder = save(tmp_path, 2, 2)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}


def test_damage_is_found(tmp_path):
    folder = save(tmp_path, 1, 3)
    assert damaged_files(folder) == []
    first, second, third = sorted(folder.glob("*.safetensors"))
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    second.write_bytes(second.read_bytes()[:-8])
    third.unlink()
    changed, short, missing = damaged_files(folder)
    assert "has changed" in changed and "bytes instead of" in short and "is missing" in missing
    assert [damaged_files(folder, share, 3) for share in range(3)] == [[changed], [short], [missing]]
    (folder / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        damaged_files(folder)


def test_elements_that_nobody_wrote_are_missed(tmp_path):
    aside = tmp_path / "aside"
    aside.mkdir()
    for rank, pieces in enumerate(list(held(1, 3))[:2]):
        write_rank(aside, rank, pieces, "a run")
    folder = tmp_path / "step"
    complete(aside, folder, 2, SHAPES, torch.float32, patience=1.0, run_id="a run")
    with pytest.raises(ValueError, match="16 of 24 elements of rows are there"):
        PieceReader(folder).get("rows")
    with pytest.raises(ValueError, match="has no step of rows"):
        PieceReader(folder).get("rows", "step")
    with pytest.raises(ValueError, match="no tensor 'other'"):
        PieceReader(folder).get("other")


def test_no_checkpoint_without_every_rank(tmp_path):
    aside = tmp_path / "aside"
    aside.mkdir()
    write_rank(aside, 0, next(held(1, 2)), "a run")
    with pytest.raises(OSError, match="rank 1 did not write its part of step"):
        complete(aside, tmp_path / "step", 2, SHAPES, torch.float32, patience=0.1, run_id="a run")
    mark_failed(aside, 1)
    with pytest.raises(OSError, match="rank 1 could not write its part of step"):
        complete(aside, tmp_path / "step", 2, SHAPES, torch.float32, patience=60.0, run_id="a run")
    assert not (tmp_path / "step").exists()


def test_a_checkpoint_is_replaced_when_the_new_one_is_complete(tmp_path):
    older = save(tmp_path, 1, 2)
    content = {path.name: path.read_bytes() for path in older.iterdir()}
    aside = tmp_path / ".step.unfinished"
    aside.mkdir()
    mark_failed(aside, 0)
    with pytest.raises(OSError, match="rank 0 could not write"):
        complete(aside, older, 1, SHAPES, torch.float32, patience=60.0, run_id="a run")
    assert {path.name: path.read_bytes() for path in older.iterdir()} == content
    shutil.rmtree(aside)
    aside.mkdir()
    write_rank(aside, 0, next(held(1, 1)), "a run")
    complete(aside, older, 1, SHAPES, torch.float32, patience=60.0, run_id="a run")
    assert sorted(path.name for path in older.iterdir()) == [MANIFEST, "rank-00000.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == [older.name]
