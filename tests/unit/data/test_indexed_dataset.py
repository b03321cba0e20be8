"""The binary format: round trip, damage, and Megatron's own reader."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_haplovl.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter

SEQUENCES = [[1, 2, 3], [], [70000], [], [5, 6], []]


def write(prefix: Path, dtype: Any = np.int32, sequences: list[list[int]] = SEQUENCES) -> str:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for sequence in sequences:
            writer.add(sequence)
    return str(prefix)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float32])
def test_round_trip(tmp_path: Path, dtype: Any) -> None:
    dataset = IndexedDataset(write(tmp_path / "x", dtype))
    for data in (dataset, pickle.loads(pickle.dumps(dataset))):
        assert [data[i].tolist() for i in range(len(data))] == SEQUENCES
        assert data[2].dtype == dtype
    assert dataset.flat().tolist() == [1, 2, 3, 70000, 5, 6]
    assert dataset.starts().tolist() == [0, 3, 3, 4, 4, 6]


def test_nothing_at_all(tmp_path: Path) -> None:
    assert len(IndexedDataset(write(tmp_path / "a", np.uint8, []))) == 0
    empty = IndexedDataset(write(tmp_path / "b", np.uint8, [[], []]))
    assert [empty[0].tolist(), empty[1].tolist(), empty.flat().tolist()] == [[], [], []]


def test_failure_leaves_no_index(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), IndexedDatasetWriter(tmp_path / "x", np.int32) as writer:
        writer.add([1])
        raise RuntimeError
    with pytest.raises(ValueError, match=r"x\.idx does not exist"):
        IndexedDataset(tmp_path / "x")


def test_truncated_files(tmp_path: Path) -> None:
    prefix = Path(write(tmp_path / "x"))
    data, index = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    whole = index.read_bytes()
    for cut in (len(whole) - 1, 40, 20):
        index.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"x\.idx is truncated"):
            IndexedDataset(prefix)
    index.write_bytes(b"something else")
    with pytest.raises(ValueError, match="does not start with MMIDIDX"):
        IndexedDataset(prefix)
    index.write_bytes(whole[:9] + b"\x02" + whole[10:])
    with pytest.raises(ValueError, match="has version 2"):
        IndexedDataset(prefix)
    index.write_bytes(whole)
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"x\.bin is truncated: it has 23 bytes, its index needs 24"):
        IndexedDataset(prefix)
    data.unlink()
    with pytest.raises(ValueError, match=r"x\.bin does not exist"):
        IndexedDataset(prefix)


def test_damaged_index(tmp_path: Path) -> None:
    """What opening does not look at is found when the sequence is read, and when all are."""
    prefix = write(tmp_path / "x")
    index = Path(f"{prefix}.idx")
    whole = index.read_bytes()
    for place, bad in ((34, -1), (34, 1000), (34 + 4 * 6, -4), (34 + 4 * 6, 10**6)):
        index.write_bytes(whole[:place] + bad.to_bytes(4, "little", signed=True) + whole[place + 4 :])
        with pytest.raises(ValueError, match=r"x\.idx is damaged: sequence 0 would be the bytes"):
            IndexedDataset(prefix)[0]
        with pytest.raises(ValueError, match="is damaged: it has negative lengths|do not follow each other in order"):
            IndexedDataset(prefix).flat()


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.float32])
def test_megatron_reads_it(tmp_path: Path, dtype: Any) -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    sequences = [[1, 2, 3], [], [7], [5, 6]]
    prefix = write(tmp_path / "x", dtype, sequences)
    dataset = megatron.IndexedDataset(prefix)
    assert [dataset[i].tolist() for i in range(len(dataset))] == sequences
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]


def test_bytes_are_those_of_megatrons_builder(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    for sequence in SEQUENCES:
        builder.add_document(torch.tensor(sequence, dtype=torch.int32), [len(sequence)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    write(tmp_path / "ours")
    for kind in ("bin", "idx"):
        assert (tmp_path / f"ours.{kind}").read_bytes() == (tmp_path / f"theirs.{kind}").read_bytes()
