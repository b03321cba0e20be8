"""What a damaged or malicious file may say: names that lead elsewhere, wrong types, impossible places and sizes."""

from __future__ import annotations

import copy
import json
import math
import random
import re
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_haplovl.checkpoint.find import find_resumable
from megatron_haplovl.checkpoint.folders import read_iteration, resolve_checkpoint
from megatron_haplovl.checkpoint.manifest import MANIFEST, damaged_files, file_record, read_manifest
from megatron_haplovl.checkpoint.names import plain_name
from megatron_haplovl.checkpoint.pieces import MOMENTS, WEIGHT, Piece, PieceReader
from megatron_haplovl.checkpoint.safetensors_stream import read_header, read_metadata
from megatron_haplovl.checkpoint.state import TrainingState, read_state
from megatron_haplovl.checkpoint.weight_files import WeightReader, write_weights
from megatron_haplovl.checkpoint.write import complete, settings_texts, write_rank, write_settings
from megatron_haplovl.config.files import read_config
from megatron_haplovl.config.schema import Config
from megatron_haplovl.parallel.groups import Group

BAD_NAMES: list[Any] = [
    *("", ".", "..", "../x", "../../x", "/etc", "a/b", "a/", "a\\b", "a\0b", "a\nb", "x" * 256, "\ud800"),
    *(None, 3, ["a"], {}),
]
SHAPES = {"a": torch.Size((2, 3)), "b": torch.Size((4,))}


def save(root):
    aside = root / "aside"
    aside.mkdir(parents=True)
    write_settings(aside, *settings_texts(Config(), TrainingState(7, 4, "a plan", "a run")))
    whole = [(Piece("b", kind, None, 0, 1, 0, 4), torch.arange(4.0)) for kind in (WEIGHT, *MOMENTS)]
    write_rank(aside, 0, [(Piece("a", WEIGHT, 0, 0, 2, 0, 3), torch.arange(3.0)), *whole], "a run")
    write_rank(aside, 1, [(Piece("a", WEIGHT, 0, 1, 2, 0, 3), torch.arange(3.0, 6.0))], "a run")
    complete(aside, root / "global_step7", 2, SHAPES, torch.float32, patience=1.0, run_id="a run")
    (root / "latest").write_text("global_step7\n")
    return root / "global_step7"


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "save")


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_are_not_plain(name):
    with pytest.raises(ValueError, match=r"^here: .* is not a plain name"):
        plain_name(name, "here")
    assert plain_name("rank-00000.safetensors", "here") == "rank-00000.safetensors"


@pytest.mark.parametrize("name", [name for name in BAD_NAMES if isinstance(name, str) and name not in ("\ud800",)])
def test_latest_names_something_beside_it(folder, name):
    (folder.parent / "x").mkdir()
    (folder.parent / "latest").write_text(name)
    with pytest.raises(ValueError, match=r"latest: .* is not a plain name"):
        resolve_checkpoint(folder.parent)


def test_latest_that_is_no_text(folder):
    (folder.parent / "latest").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"latest: .* is not a plain name"):
        resolve_checkpoint(folder.parent)


def changed(path, *at, to):
    """Change one value in a JSON file; the manifest's digest goes, as an attacker would make a new one."""
    content = json.loads(path.read_text())
    content.pop("sha256", None)
    inner = content
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = to
    path.write_text(json.dumps(content))


NO_LISTS: list[Any] = [None, {}, "x"]
FILES, PIECE = ("files", 0), ("files", 0, "pieces", 0)
HUGE = 10**400
IMPOSSIBLE: list[Any] = [
    *[((*FILES, "file"), name, "plain name|not a string") for name in BAD_NAMES],
    *[((*FILES, "bytes"), value, "bytes .* is not a number") for value in (-1, 1.5, "9", True, None, HUGE)],
    *[((*FILES, "sha256"), value, "SHA-256|not a string") for value in ("", "0" * 63, "G" * 64, 5, None)],
    *[((*FILES, "pieces"), value, "not a list") for value in NO_LISTS],
    *[
        ((*PIECE, name), value, "not a number")
        for name in ("start", "length", "part")
        for value in (-1, HUGE, "1", 0.5)
    ],
    ((*PIECE, "length"), 4, "ends behind the parameter's last element"),
    ((*PIECE, "start"), 1, "ends behind the parameter's last element"),
    ((*PIECE, "part"), 1, "two pieces hold element 0"),
    ((*PIECE, "part"), 2, "is part 2 of 2"),
    ((*PIECE, "parts"), 3, "is part 0 of 3 along dimension 0"),
    ((*PIECE, "parts"), 1, "divide the parameter in another way"),
    ((*PIECE, "dim"), 2, "along dimension 2"),
    ((*PIECE, "dim"), None, "the parameter is not divided"),
    ((*PIECE, "name"), "c", "there is no such parameter"),
    ((*PIECE, "kind"), 3, "not a string"),
    (PIECE, None, "not an object"),
    (PIECE, {}, "has the fields"),
    (("files", 1, "file"), "rank-00000.safetensors", "is named twice"),
    (("files",), {}, "not a list"),
    (("parameters",), [], "not an object"),
    (("parameters", "a"), [-2, 3], "not a number"),
    (("parameters", "a"), [10**15, 10**15], "number of elements of a"),
    (("parameters", "a"), 6, "not a list"),
    (("dtype",), "system", "is not one of float32"),
    (("dtype",), None, "not a string"),
    (("run_id",), 5, "not a string"),
]


@pytest.mark.parametrize(("at", "to", "sentence"), IMPOSSIBLE, ids=range(len(IMPOSSIBLE)))
def test_a_manifest_that_cannot_be_true(folder, at, to, sentence):
    changed(folder / MANIFEST, *at, to=to)
    with pytest.raises(ValueError, match=rf"manifest\.json.*({sentence})"):
        read_manifest(folder)
    with pytest.raises(ValueError):
        PieceReader(folder)
    with pytest.raises(ValueError, match="is damaged"):
        find_resumable(folder.parent, Group())


@pytest.mark.parametrize("name", ["iteration", "global_batch_size", "plan_key"])
@pytest.mark.parametrize("value", [-1, HUGE, 1.5, True, None, [], {}])
def test_a_state_that_cannot_be_true(folder, name, value):
    changed(folder / "training_state.json", name, to=value)
    with pytest.raises(ValueError, match=rf"training_state\.json: {name}"):
        read_state(folder)


@pytest.mark.parametrize("value", [-1, HUGE, 1.5, True, None, "7"])
def test_an_iteration_that_cannot_be_true(folder, value):
    changed(folder / "config.json", "iteration", to=value)
    with pytest.raises(ValueError, match=r"config\.json: iteration .* is not a number of at least 0"):
        read_iteration(folder)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_an_index_of_weights_names_files_beside_it(tmp_path, name):
    write_weights({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path, max_shard_bytes=8)
    changed(tmp_path / "model.safetensors.index.json", "weight_map", "a", to=name)
    with pytest.raises(ValueError, match="is not a plain name"):
        WeightReader(tmp_path)


# ---- safetensors


def with_header(path, header, values=24):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(values))
    return path


def entry(**changes):
    return {"dtype": "F32", "shape": [6], "data_offsets": [0, 24], **changes}


BROKEN_HEADERS = [
    ({"a": entry(shape=[-6])}, "shape -6 is not a number"),
    ({"a": entry(shape=[HUGE])}, r"shape \(huge\) is not a number"),
    ({"a": entry(shape=6)}, "not a list"),
    ({"a": entry(shape=[2.0, 3])}, "shape 2.0 is not a number"),
    ({"a": entry(shape=[7])}, r"of the shape \[7\] lies at \[0, 24\]"),
    ({"a": entry(shape=[1 << 40, 1 << 40])}, "lies at"),
    ({"a": entry(dtype="F33")}, "has the type 'F33'"),
    ({"a": entry(dtype=None)}, "not a string"),
    ({"a": entry(data_offsets=[24, 0])}, "lies at"),
    ({"a": entry(data_offsets=[-24, 0])}, "data_offsets -24 is not a number"),
    ({"a": entry(data_offsets=[0])}, "lies at"),
    ({"a": entry(data_offsets=[4, 28])}, "ends 4 bytes before the tensor"),
    ({"a": entry(), "b": entry()}, "overlaps"),
    ({"a": entry(), "b": entry(shape=[1], data_offsets=[20, 24])}, "overlaps"),
    ({"a": 3}, "not an object"),
    ([], "its header is no object"),
    (b"[" * 100_000, "broken safetensors file"),
    (b"\xff", "broken safetensors file"),
    (b"", "broken safetensors file"),
]


@pytest.mark.parametrize(("header", "sentence"), BROKEN_HEADERS, ids=range(len(BROKEN_HEADERS)))
def test_a_header_that_cannot_be_true(tmp_path, header, sentence):
    with pytest.raises(ValueError, match=sentence) as refused:
        read_header(with_header(tmp_path / "x.safetensors", header))
    assert "x.safetensors" in str(refused.value) and len(str(refused.value)) < 600


def test_a_header_that_is_true(tmp_path):
    header = {"__metadata__": {"run_id": "mine"}, "a": entry(), "b": entry(shape=[0, 3], data_offsets=[24, 24])}
    path = with_header(tmp_path / "x.safetensors", header)
    assert {name: tensor.count for name, tensor in read_header(path).items()} == {"a": 6, "b": 0}
    assert read_metadata(path) == {"run_id": "mine"}


@pytest.mark.parametrize("metadata", [[], "x", {"run_id": 3}, None])
def test_metadata_are_words(tmp_path, metadata):
    with pytest.raises(ValueError, match="__metadata__"):
        read_metadata(with_header(tmp_path / "x.safetensors", {"__metadata__": metadata}))


def test_a_header_that_disagrees_with_the_manifest(folder):
    with_header(folder / "rank-00001.safetensors", {"0": entry(shape=[2], data_offsets=[0, 8])})
    with pytest.raises(ValueError, match="its header and manifest.json disagree about piece 0"):
        PieceReader(folder).get("a")


# ---- anything at all

VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    3,
    HUGE,
    1.5,
    math.inf,
    math.nan,
    "",
    "..",
    "a\0b",
    "\ud800",
    [],
    {},
    [[1]],
    {"a": 1},
]


def mutated(value, chance):
    """A JSON value with something in it replaced, removed or added."""
    value = copy.deepcopy(value)
    places = []

    def collect(inner):
        items = inner.items() if isinstance(inner, dict) else enumerate(inner)
        for key, child in items:
            places.append((inner, key))
            if isinstance(child, (dict, list)):
                collect(child)

    collect(value)
    for _ in range(chance.randrange(1, 3)):
        inner, key = chance.choice(places)
        if chance.random() < 0.2 and isinstance(inner, dict):
            inner.pop(key, None)
        elif isinstance(inner, dict) or key < len(inner):
            inner[key] = chance.choice(VALUES)
    return value


def read_everything(folder):
    read_state(folder)
    read_config(folder)
    read_iteration(folder)
    damaged_files(folder)
    reader = PieceReader(folder)
    for name in reader.names():
        for kind in (WEIGHT, *MOMENTS):
            if reader.has(name, kind):
                reader.get(name, kind)


@pytest.mark.parametrize("name", [MANIFEST, "training_state.json", "config.json", "rank-00000.safetensors"])
def test_nothing_but_a_sentence_comes_of_any_change(folder, name):
    chance, path, refused = random.Random(0), folder / name, 0
    original = path.read_bytes()
    if path.suffix == ".safetensors":
        length = int.from_bytes(original[:8], "little")
        content, values = json.loads(original[8 : 8 + length]), original[8 + length :]
    else:
        content = json.loads(original)
        content.pop("sha256", None)
    for _ in range(300):
        text = json.dumps(mutated(content, chance)).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + values if path.suffix == ".safetensors" else text)
        try:
            read_everything(folder)
        except ValueError as error:
            refused += 1
            assert re.search(r"\.json|safetensors|global_step7", str(error)), error
    assert refused > 20


# ---- two runs


def test_pieces_of_another_run_are_refused(tmp_path):
    aside = tmp_path / "aside"
    aside.mkdir()
    write_settings(aside, *settings_texts(Config(), TrainingState(7, 4, "a plan", "a run")))
    write_rank(aside, 0, [(Piece("b", WEIGHT, None, 0, 1, 0, 4), torch.ones(4))], "another")
    with pytest.raises(OSError, match="rank-00000.json was written by the run another, and this is the run a run"):
        complete(aside, tmp_path / "step", 1, SHAPES, torch.float32, patience=1.0, run_id="a run")
    write_rank(aside, 0, [(Piece("b", WEIGHT, None, 0, 1, 0, 4), torch.ones(4))], "a run")
    write_settings(
        aside,
        settings_texts(Config(), TrainingState(8, 4, "x", "a run"))[0],
        (aside / "training_state.json").read_text(),
    )
    with pytest.raises(OSError, match="config.json is not what this run wrote there"):
        complete(aside, tmp_path / "step", 1, SHAPES, torch.float32, patience=1.0, run_id="a run")
    write_settings(aside, *settings_texts(Config(), TrainingState(8, 4, "x", "another")))
    write_rank(aside, 0, [(Piece("b", WEIGHT, None, 0, 1, 0, 4), torch.ones(4))], "a run")
    with pytest.raises(OSError, match="training_state.json was written by the run another"):
        complete(aside, tmp_path / "step", 1, SHAPES, torch.float32, patience=1.0, run_id="a run")
    assert not (tmp_path / "step").exists()


def test_every_file_says_whose_it_is(folder):
    assert read_metadata(folder / "rank-00001.safetensors")["run_id"] == "a run"
    assert read_state(folder).run_id == "a run" and read_manifest(folder)["run_id"] == "a run"
    assert damaged_files(folder) == []


@pytest.mark.parametrize("other", [None, "another"])
def test_files_of_two_runs_are_damage_though_every_checksum_fits(folder, other):
    changed(folder / MANIFEST, "run_id", to=other)
    damage = damaged_files(folder)
    assert len(damage) == 3 and all(
        f"of the run a run, but manifest.json of the run {other}" in text for text in damage
    )


def test_checkpoints_of_earlier_versions_name_no_run(tmp_path):
    folder = tmp_path / "global_step7"
    folder.mkdir()
    save_file({"0": torch.arange(4.0)}, folder / "rank-00000.safetensors")
    (folder / "training_state.json").write_text('{"iteration": 7, "global_batch_size": 4, "plan_key": "x"}')
    piece = {"name": "b", "kind": WEIGHT, "dim": None, "part": 0, "parts": 1, "start": 0, "length": 4}
    records = [{**file_record(folder / "rank-00000.safetensors"), "pieces": [piece]}]
    records.append({**file_record(folder / "training_state.json"), "pieces": []})
    (folder / MANIFEST).write_text(json.dumps({"dtype": "float32", "parameters": {"b": [4]}, "files": records}))
    assert damaged_files(folder) == [] and read_state(folder).run_id is None
    assert torch.equal(PieceReader(folder).get("b"), torch.arange(4.0))
