from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.measure import peak_mib
from megatron_haplovl.checkpoint.folders import read_iteration, resolve_checkpoint
from megatron_haplovl.checkpoint.safetensors_stream import read_header
from megatron_haplovl.checkpoint.weight_files import INDEX_FILE, SINGLE_FILE, WeightReader, write_weights
from megatron_haplovl.config.files import read_config
from megatron_haplovl.config.schema import Config, DataConfig, ModelConfig
from megatron_haplovl.config.vision import VisionConfig


def _state() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor(2.5)}


def _assert_reads_back(reader: WeightReader, state: dict[str, torch.Tensor]) -> None:
    assert reader.names() == sorted(state)
    for name, tensor in state.items():
        assert reader.shape(name) == tuple(tensor.shape)
        assert reader.get(name).dtype == tensor.dtype
        assert torch.equal(reader.get(name), tensor)


def test_one_file(tmp_path: Path) -> None:
    assert write_weights(_state(), tmp_path) == 24 + 8 + 4
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE_FILE]
    _assert_reads_back(WeightReader(tmp_path), _state())


def test_shards(tmp_path: Path) -> None:
    write_weights(_state(), tmp_path, max_shard_bytes=32)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert index == {"metadata": {"total_size": 36}, "weight_map": {"a": first, "b": first, "c": second}}
    assert sorted(load_file(tmp_path / first)) == ["a", "b"]
    _assert_reads_back(WeightReader(tmp_path), _state())


def test_rewriting_leaves_no_file_of_the_earlier_call(tmp_path: Path) -> None:
    write_weights(_state(), tmp_path, max_shard_bytes=8)
    (tmp_path / "unfinished-00009.safetensors").write_bytes(b"interrupted")
    write_weights({"d": torch.zeros(1)}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE_FILE]
    assert WeightReader(tmp_path).names() == ["d"]


def test_a_stream_is_written_tensor_by_tensor(tmp_path: Path) -> None:
    """Memory holds no more than a few of 96 MiB at any time, though one shard takes them all."""

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for i in range(96):
            yield f"t{i:02}", torch.full((2**18,), float(i))

    write_weights(stream(), tmp_path)
    shutil.rmtree(tmp_path)
    assert peak_mib(lambda: write_weights(stream(), tmp_path), "cpu") < 24
    reader = WeightReader(tmp_path)
    assert all(torch.equal(reader.get(name), tensor) for name, tensor in stream())
    assert sum(float(reader.get(name)[-1]) for name in reader.names()) == 96 * 95 / 2


def test_a_folder_is_replaced_at_the_end(tmp_path: Path) -> None:
    """A call that fails half-way leaves the earlier files as they were."""
    write_weights(_state(), tmp_path)

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        yield "first", torch.zeros(4)
        raise OSError(errno.ENOSPC, "disk full")

    with pytest.raises(OSError, match="disk full"):
        write_weights(stream(), tmp_path)
    _assert_reads_back(WeightReader(tmp_path), _state())


def test_files_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    """The library reads our files, even with number formats of several widths in one file."""
    state = {
        "byte": torch.arange(3, dtype=torch.uint8),
        "float": torch.tensor([1.5]),  # cannot begin at the third byte of a file
        "half": torch.ones(3, dtype=torch.float16),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4),
        "long": torch.arange(2),
        'a "quoted" näme': torch.zeros(1),
    }
    write_weights(state, tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        assert header.pop("__metadata__") == {"format": "pt"}
        # Older releases of the library need this alignment, and so does whoever maps a file into memory.
        for name, entry in header.items():
            assert (start + entry["data_offsets"][0]) % state[name].element_size() == 0, name
    loaded = {name: tensor for path in tmp_path.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    _assert_reads_back(WeightReader(tmp_path), state)


def test_the_librarys_files_are_read_in_parts(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {
        "a": torch.randn(5, 3),
        "b": torch.arange(7, dtype=torch.int64),
        "c": torch.randn(4).bfloat16(),
        "d": torch.empty(0, 2),
        "e": torch.tensor(2.0),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    stored = read_header(path)
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert stored[name].count == tensor.numel()
        for first, end in {(0, tensor.numel()), (tensor.numel() // 3, tensor.numel() // 2)}:
            found = stored[name].read(first, end)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor.reshape(-1)[first:end])

    path.write_bytes(path.read_bytes()[:-4])
    last = max(stored.values(), key=lambda tensor: tensor.start)
    with pytest.raises(ValueError, match="ends 4 bytes before"):
        last.read(0, last.count)
    for broken in (b"", b"PK" * 100, (10**9).to_bytes(8, "little"), (2).to_bytes(8, "little") + b"[]"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="broken safetensors file"):
            read_header(path)


def test_more_tensors_than_one_header_holds(tmp_path: Path) -> None:
    state = {f"model.layers.{i}.a_rather_long_name_of_a_weight": torch.full((1,), float(i)) for i in range(1500)}
    write_weights(state, tmp_path)
    assert len(list(tmp_path.glob("model-*-of-00002.safetensors"))) == 2
    _assert_reads_back(WeightReader(tmp_path), state)


def test_a_number_format_without_a_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a has the number format torch\.complex64, which cannot be written"):
        write_weights({"a": torch.zeros(1, dtype=torch.complex64)}, tmp_path)


def test_views_and_tied_tensors_are_written_whole(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(4, 3)
    state = {"view": whole[1:3], "transposed": whole.T, "whole": whole, "tied": whole}
    write_weights(state, tmp_path)
    _assert_reads_back(WeightReader(tmp_path), state)


def test_a_name_twice_is_refused(tmp_path: Path) -> None:
    pairs = [("a", torch.zeros(2)), ("a", torch.zeros(2))]
    with pytest.raises(ValueError, match="twice"):
        write_weights(iter(pairs), tmp_path)
    with pytest.raises(ValueError, match="twice"):
        write_weights(iter(pairs), tmp_path, max_shard_bytes=8)


@pytest.mark.parametrize("sharded", [False, True])
def test_pickled_weights(tmp_path: Path, sharded: bool) -> None:
    state = _state()
    if sharded:
        torch.save({"a": state["a"]}, tmp_path / "one.bin")
        torch.save({"b": state["b"], "c": state["c"]}, tmp_path / "two.bin")
        index = {"weight_map": {"a": "one.bin", "b": "two.bin", "c": "two.bin"}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    _assert_reads_back(WeightReader(tmp_path), state)


class _RunsCode:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise RuntimeError('code from a pickle was run')",)


def test_a_pickle_cannot_run_code(tmp_path: Path) -> None:
    torch.save({"a": _RunsCode()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read"):
        WeightReader(tmp_path)


def test_reader_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        WeightReader(tmp_path / "missing")
    with pytest.raises(ValueError, match="no weights here"):
        WeightReader(tmp_path)
    write_weights(_state(), tmp_path)
    with pytest.raises(ValueError, match="no tensor 'z'"):
        WeightReader(tmp_path).get("z")
    content = (tmp_path / SINGLE_FILE).read_bytes()
    (tmp_path / SINGLE_FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors: broken"):
        WeightReader(tmp_path)


def test_missing_shard(tmp_path: Path) -> None:
    write_weights(_state(), tmp_path, max_shard_bytes=32)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors \(1 tensors\), which is missing"):
        WeightReader(tmp_path)


def test_an_index_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(ValueError, match="is not a plain name"):
        WeightReader(tmp_path)


def test_resolve_checkpoint(tmp_path: Path) -> None:
    step = tmp_path / "global_step3"
    step.mkdir()
    with pytest.raises(ValueError, match="neither a --save folder"):
        resolve_checkpoint(tmp_path)
    (step / "config.json").write_text("{}")
    (tmp_path / "latest").write_text("global_step3\n")
    assert resolve_checkpoint(tmp_path) == step
    assert resolve_checkpoint(step) == step
    (tmp_path / "latest").write_text("global_step4")
    with pytest.raises(ValueError, match="global_step4'?, but .* is missing"):
        resolve_checkpoint(tmp_path)
    (tmp_path / "latest").write_text("../global_step3")
    with pytest.raises(ValueError, match="is not a plain name"):
        resolve_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="no such checkpoint folder"):
        resolve_checkpoint(tmp_path / "missing")


def test_config_survives_json(tmp_path: Path) -> None:
    config = dataclasses.replace(
        Config(),
        model=ModelConfig(vocab_size=77, vision=VisionConfig(patch_size=7)),
        data=DataConfig(data_path=("0.5", "a", "0.5", "b")),
    )
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "iteration": 12}))
    assert read_config(tmp_path) == config
    assert read_iteration(tmp_path) == 12


def test_config_with_an_unknown_setting(tmp_path: Path) -> None:
    values = Config().to_dict()
    values["model"]["pre"]["wings"] = 2
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="unknown setting model.pre.wings"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match="iteration .* is not a number of at least 0"):
        read_iteration(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_config(tmp_path)
