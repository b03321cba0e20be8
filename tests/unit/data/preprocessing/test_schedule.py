"""Parts are made and joined in one order, whatever is known of the files' lengths, and are found from anywhere."""

from __future__ import annotations

import gzip
import json
import pickle
import random
from pathlib import Path

import pytest

from megatron_haplovl.data.preprocessing.parts_folder import PartDone, PartsFolder
from megatron_haplovl.data.preprocessing.processor import ProcessorSettings, RecordProcessor
from megatron_haplovl.data.preprocessing.record_source import RecordSource
from megatron_haplovl.data.preprocessing.schedule import Schedule, all_spans, share_of
from megatron_haplovl.data.preprocessing.workers import PartMaker
from megatron_haplovl.data.records import RawRecord


def write_inputs(folder: Path, records: int) -> list[Path]:
    """The same records as lines, as packed lines, as a list and as a table."""
    import pyarrow
    from pyarrow import parquet

    values = [{"id": number, "text": "x" * (number % 7)} for number in range(records)]
    lines = "".join(json.dumps(value) + "\n" + "\n" * (value["id"] % 3 == 0) for value in values)  # type: ignore[operator]
    paths = [folder / f"r.{suffix}" for suffix in ("jsonl", "jsonl.gz", "json", "parquet")]
    paths[0].write_text("\ufeff\n" + lines, encoding="utf-8")
    paths[1].write_bytes(gzip.compress(lines.encode()))
    paths[2].write_text(json.dumps(values))
    schema = pyarrow.schema({"id": pyarrow.int64(), "text": pyarrow.string()})
    parquet.write_table(pyarrow.Table.from_pylist(values, schema), paths[3], row_group_size=5)
    return paths


def simulate(source: RecordSource, schedule: Schedule, workers: int, rng: random.Random) -> list[str]:
    """Names of the parts in the order in which they are joined, when workers end in any order."""
    busy: list[PartDone] = []
    joined: list[str] = []
    while not schedule.is_over:
        while len(busy) < workers and (part := schedule.next_to_make()):
            busy.append(PartDone(part.name, sum(1 for _ in source.read(part)), 0))
        while (done := schedule.next_to_join()) is not None:
            joined.append(done.name)
        if busy:
            schedule.add(busy.pop(rng.randrange(len(busy))))
    return joined


@pytest.mark.parametrize("records", [0, 1, 6, 7, 8, 14, 20])
def test_every_part_once_and_in_order(tmp_path: Path, records: int) -> None:
    paths = write_inputs(tmp_path, records)
    source = RecordSource(paths, 7)
    names = [f"{file:05d}-{number:06d}" for file in range(4) for number in range(-(-records // 7))]
    rng = random.Random(records)
    for workers in (1, 2, 5):
        schedule = Schedule(source, all_spans(source), {}, None)
        assert simulate(source, schedule, workers, rng) == names
        assert schedule.ends == dict.fromkeys(range(4), -(-records // 7))
        # Some are there from before.
        there = {name: PartDone(name, min(7, records - 7 * int(name[-6:])), 0) for name in names if rng.random() < 0.5}
        assert simulate(source, Schedule(source, all_spans(source), there, None), workers, rng) == names
        assert simulate(source, Schedule(source, all_spans(source), there, schedule.ends), workers, rng) == names
    for total in (1, 3, 50):
        shares = [
            simulate(source, Schedule(source, share_of(source, i, total), {}, None), 3, rng) for i in range(total)
        ]
        assert [name for share in shares for name in share] == names
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_parts_have_the_records_of_the_file_from_any_side(tmp_path: Path) -> None:
    source = RecordSource(write_inputs(tmp_path, 20), 7)
    for file in range(4):
        parts = [part for part, _ in zip(source.parts(file), range(3), strict=False)]
        whole: list[RawRecord] = [raw for part in parts for raw in source.read(part)]
        assert [raw.id for raw in whole] == [str(number) for number in range(20)]
        # Backwards, as a process does that goes on from an earlier run.
        assert [raw for part in reversed(parts) for raw in source.read(part)][-7:] == whole[:7]
        assert [raw.location for raw in source.read(parts[1])] == [raw.location for raw in whole[7:14]]


def test_a_maker_can_be_sent_to_a_process(tmp_path: Path, tiny_spm_model: Path) -> None:
    """Where processes are not forked."""
    (tmp_path / "r.jsonl").write_text('{"text": "It is red."}\n' * 3)
    (tmp_path / "parts").mkdir()
    source = RecordSource([tmp_path / "r.jsonl"], 2)
    processor = RecordProcessor(ProcessorSettings(str(tiny_spm_model), "vicuna_v1"))
    maker: PartMaker = pickle.loads(pickle.dumps(PartMaker(processor, source, PartsFolder(tmp_path / "parts"))))
    first, second = source.parts(0)
    assert maker.make(first) == PartDone("00000-000000", 2, 0)
    assert maker.make(second) == PartDone("00000-000001", 1, 0)
    assert PartsFolder(tmp_path / "parts").finished().keys() == {"00000-000000", "00000-000001"}
    manifest = tmp_path / "parts" / "00000-000001" / "part.manifest.json"
    assert '"text_only_samples": 1' in manifest.read_text()
