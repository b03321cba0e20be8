"""Weight files in folders of the Hugging Face form: read one tensor at a time, written in shards.

Teachers, language models and exported models are such folders; what a run saves is read by `checkpoint.pieces`.
Pickled files are read with `weights_only=True`, so that a file cannot run code.
"""

from __future__ import annotations

import contextlib
import json
import pickle
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from megatron_haplovl.checkpoint.files import to_disk, write_text
from megatron_haplovl.checkpoint.names import plain_name
from megatron_haplovl.checkpoint.safetensors_stream import SafetensorsFile
from megatron_haplovl.config.files import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLED_FILE = "pytorch_model.bin"
_PICKLED_INDEX = "pytorch_model.bin.index.json"
_SHARD_BYTES = 5 * 10**9


class TensorSource(Protocol):
    """What the mappings read from: tensors by name."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def get(self, name: str) -> torch.Tensor: ...


class WeightReader:
    """The tensors of one folder, read when they are asked for.

    Understands `model.safetensors`, its sharded form with an index, and the older `pytorch_model.bin`, also sharded.

    Args:
        folder: the folder that holds the weight files.

    Raises:
        ValueError: there is no such folder, it holds no weights, or its index names a missing or broken file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder}: no such folder")
        self._file_of = _locate_tensors(self.folder)
        self._pickled: dict[Path, dict[str, torch.Tensor]] = {}

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading its values.

        Raises:
            ValueError: no tensor has this name.
        """
        path = self._path(name)
        if path.suffix == ".safetensors":
            with _open_safetensors(path) as file:
                return tuple(file.get_slice(name).get_shape())
        return tuple(self._unpickle(path)[name].shape)

    def get(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in the number format in which it is stored.

        Raises:
            ValueError: no tensor has this name.
        """
        path = self._path(name)
        if path.suffix == ".safetensors":
            with _open_safetensors(path) as file:
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor
        return self._unpickle(path)[name]

    def _path(self, name: str) -> Path:
        if name not in self._file_of:
            raise ValueError(f"{self.folder}: there is no tensor {name!r} among its {len(self._file_of)}")
        return self._file_of[name]

    def _unpickle(self, path: Path) -> dict[str, torch.Tensor]:
        # Memory-mapped, so that keeping every shard open costs address space only.
        if path not in self._pickled:
            self._pickled[path] = _load_pickled(path)
        return self._pickled[path]


def check_shape(source: TensorSource, name: str, expected: tuple[int, ...]) -> None:
    """Compare a stored tensor's shape with the one that the model needs.

    Raises:
        ValueError: they differ, or there is no such tensor.
    """
    shape = tuple(source.shape(name))
    if shape != expected:
        where = f"{source.folder}: " if isinstance(source, WeightReader) else ""
        raise ValueError(f"{where}{name} has the shape {list(shape)}, but the model needs {list(expected)}")


def _locate_tensors(folder: Path) -> dict[str, Path]:
    """Map the name of each tensor in `folder` to the file that holds it."""
    for index_name in (INDEX_FILE, _PICKLED_INDEX):
        index = folder / index_name
        if index.is_file():
            return _read_index(index)
    if (folder / SINGLE_FILE).is_file():
        with _open_safetensors(folder / SINGLE_FILE) as file:
            return dict.fromkeys(file.keys(), folder / SINGLE_FILE)
    if (folder / _PICKLED_FILE).is_file():
        return dict.fromkeys(_load_pickled(folder / _PICKLED_FILE), folder / _PICKLED_FILE)
    raise ValueError(f"{folder}: no weights here ({SINGLE_FILE}, {_PICKLED_FILE}, or either in shards with an index)")


def _read_index(index: Path) -> dict[str, Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index}: has no weight_map")
    for file_name in {plain_name(value, str(index)) for value in weight_map.values()}:
        if not (index.parent / file_name).is_file():
            missing = sum(value == file_name for value in weight_map.values())
            raise ValueError(f"{index}: names the file {file_name} ({missing} tensors), which is missing")
    return {name: index.parent / file_name for name, file_name in weight_map.items()}


def _load_pickled(path: Path) -> dict[str, torch.Tensor]:
    try:
        state: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read as plain tensors ({error})") from error
    if not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path}: holds more than tensors by name; save its state_dict() alone")
    return state


@contextlib.contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: broken safetensors file ({error})") from error


def write_weights(
    tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    folder: str | Path,
    *,
    max_shard_bytes: int = _SHARD_BYTES,
) -> int:
    """Write tensors as safetensors, in one file or in shards with an index.

    An iterable is consumed as a stream: no more than one tensor is held in memory. The files get their names when all
    of them are on the disk, and the index last. Weight files that an earlier call left in the folder are replaced.

    Args:
        tensors: name -> tensor, or pairs of them.
        folder: created if it does not exist.
        max_shard_bytes: size at which the next shard begins.

    Returns:
        Bytes of all tensors.

    Raises:
        ValueError: a name occurs twice, or there is nothing to write.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _write_shards(tensors.items() if isinstance(tensors, Mapping) else tensors, folder, max_shard_bytes)
    if not shards:
        raise ValueError(f"{folder}: no tensors to write")

    # The old files, and what an interrupted call left, go only now, when the new ones are complete.
    new = {shard.path for shard in shards}
    stale = {*folder.glob("model-*-of-*.safetensors"), *folder.glob("unfinished-*")} - new
    for old in (*stale, folder / SINGLE_FILE, folder / INDEX_FILE):
        old.unlink(missing_ok=True)
    total = sum(shard.size for shard in shards)
    if len(shards) == 1:
        shards[0].path.rename(folder / SINGLE_FILE)
    else:
        weight_map: dict[str, str] = {}
        for i, shard in enumerate(shards):
            file_name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            shard.path.rename(folder / file_name)
            weight_map.update(dict.fromkeys(shard.names, file_name))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(folder / INDEX_FILE, json.dumps(index, indent=2))
    to_disk(folder)
    return total


def _write_shards(pairs: Iterable[tuple[str, torch.Tensor]], folder: Path, max_bytes: int) -> list[SafetensorsFile]:
    """Write a stream of tensors to files of at most `max_bytes` (or of one larger tensor)."""
    shards: list[SafetensorsFile] = []
    seen: set[str] = set()
    with contextlib.ExitStack() as last, contextlib.closing(_read_ahead(pairs)) as ready:
        for name, tensor in ready:
            if name in seen:
                raise ValueError(f"{folder}: tensor written twice: {name}")
            seen.add(name)
            fits = shards and shards[-1].size + tensor.nbytes <= max_bytes and shards[-1].has_room_for(name, tensor)
            if not fits:
                last.close()
                path = folder / f"unfinished-{len(shards):05d}.safetensors"
                shards.append(last.enter_context(SafetensorsFile(path)))
            shards[-1].write(name, tensor)
    return shards


def _read_ahead(pairs: Iterable[tuple[str, torch.Tensor]]) -> Generator[tuple[str, torch.Tensor]]:
    """Make each tensor while the one before it is written: reading, computing and writing then overlap."""
    source = iter(pairs)

    def make() -> tuple[str, torch.Tensor] | None:
        if (pair := next(source, None)) is None:
            return None
        # Copied here, because a mapped file is read only when its tensor is first touched.
        return pair[0], pair[1].detach().to("cpu", copy=True)

    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(make)
        while (pair := following.result()) is not None:
            following = thread.submit(make)
            yield pair
