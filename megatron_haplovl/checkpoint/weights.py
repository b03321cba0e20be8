"""Weight files and checkpoint folders: reading one tensor at a time, writing shards.

Hugging Face folders (teachers, language models, exported models) are read here; what a run saves is read by
`checkpoint.pieces`. Pickled files are read with `weights_only=True`, so that a file cannot run code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_haplovl.config.schema import Config

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
    for file_name in set(weight_map.values()):
        if Path(file_name).name != file_name:
            raise ValueError(f"{index}: {file_name!r} is not a plain file name")
        if not (index.parent / file_name).is_file():
            missing = sum(value == file_name for value in weight_map.values())
            raise ValueError(f"{index}: names the file {file_name} ({missing} tensors), which is missing")
    return {name: index.parent / file_name for name, file_name in weight_map.items()}


def _load_pickled(path: Path) -> dict[str, torch.Tensor]:
    try:
        state: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read as plain tensors ({error})") from error
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

    An iterable is consumed as a stream: no more than one shard is held in memory. Weight files that an earlier call
    left in the folder are replaced.

    Args:
        tensors: name -> tensor, or pairs of them.
        folder: created where it does not exist.
        max_shard_bytes: size at which the next shard begins.

    Returns:
        Bytes of all tensors.

    Raises:
        ValueError: a name occurs twice, or there is nothing to write.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    shards: list[list[str]] = []
    seen: set[str] = set()
    total = 0
    for shard in _group_by_size(pairs, max_shard_bytes):
        if repeated := seen.intersection(shard):
            raise ValueError(f"{folder}: tensors written twice: {sorted(repeated)}")
        seen.update(shard)
        total += sum(tensor.nbytes for tensor in shard.values())
        save_file(shard, _unfinished(folder, len(shards)), metadata={"format": "pt"})
        shards.append(list(shard))
    if not shards:
        raise ValueError(f"{folder}: no tensors to write")

    # The old files, and what an interrupted call left, go only now, when the new ones are complete.
    new = {_unfinished(folder, i) for i in range(len(shards))}
    stale = {*folder.glob("model-*-of-*.safetensors"), *folder.glob("unfinished-*.safetensors")} - new
    for old in (*stale, folder / SINGLE_FILE, folder / INDEX_FILE):
        old.unlink(missing_ok=True)
    if len(shards) == 1:
        _unfinished(folder, 0).rename(folder / SINGLE_FILE)
        return total
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file_name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        _unfinished(folder, i).rename(folder / file_name)
        weight_map.update(dict.fromkeys(names, file_name))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def _unfinished(folder: Path, shard: int) -> Path:
    return folder / f"unfinished-{shard:05d}.safetensors"


def _group_by_size(pairs: Iterable[tuple[str, torch.Tensor]], max_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    """Cut a stream of tensors into dictionaries of at most `max_bytes` (or of one larger tensor)."""
    group: dict[str, torch.Tensor] = {}
    size = 0
    storages: set[int] = set()
    for name, tensor in pairs:
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in storages:
            tensor = tensor.clone()  # a safetensors file holds every tensor by itself: tied ones twice, views whole
        if group and size + tensor.nbytes > max_bytes:
            yield group
            group, size, storages = {}, 0, set()
        if name in group:
            raise ValueError(f"tensor written twice: {name}")
        group[name] = tensor
        size += tensor.nbytes
        storages.add(tensor.untyped_storage().data_ptr())
    if group:
        yield group


def resolve_checkpoint(path: str | Path) -> Path:
    """The folder `global_stepN` that a path means: itself, or the newest one of a --save folder.

    Raises:
        ValueError: the path is neither, or `latest` names a folder that is missing.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such checkpoint folder")
    latest = path / "latest"
    if not latest.is_file():
        if (path / "config.json").is_file():
            return path
        raise ValueError(f"{path}: neither a --save folder (no file `latest`) nor a checkpoint (no config.json)")
    name = latest.read_text(encoding="utf-8").strip()
    if not name or Path(name).name != name:
        raise ValueError(f"{latest}: {name!r} is not the name of a folder beside it")
    if not (path / name).is_dir():
        raise ValueError(f"{latest}: names the checkpoint {name!r}, but {path / name} is missing")
    return path / name


def read_config(checkpoint: str | Path) -> Config:
    """The configuration with which a training checkpoint was saved.

    Args:
        checkpoint: a `global_stepN` folder.

    Raises:
        ValueError: config.json is missing, malformed, or holds a setting that this version does not know.
    """
    path = Path(checkpoint) / "config.json"
    values = read_json(path)
    values.pop("iteration", None)
    config = _build(Config, values, str(path))
    assert isinstance(config, Config)
    return config


def read_iteration(checkpoint: str | Path) -> int:
    """Optimizer steps that the model of a `global_stepN` folder has seen.

    Raises:
        ValueError: config.json is missing or does not say.
    """
    path = Path(checkpoint) / "config.json"
    iteration = read_json(path).get("iteration")
    if not isinstance(iteration, int):
        raise ValueError(f"{path}: has no iteration")
    return iteration


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object.

    Raises:
        ValueError: it is missing, or not that.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


def _build(section: Any, values: Mapping[str, Any], where: str) -> Any:
    """Rebuild one (nested) dataclass from what `dataclasses.asdict` and JSON made of it."""
    types = typing.get_type_hints(section)
    known = {f.name for f in dataclasses.fields(section)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{where}: unknown settings in {section.__name__}: {', '.join(unknown)}")
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(types[name]):
            if not isinstance(value, dict):
                raise ValueError(f"{where}: {name} holds {value!r}, not an object")
            arguments[name] = _build(types[name], value, where)
        else:
            arguments[name] = tuple(value) if isinstance(value, list) else value
    return section(**arguments)
