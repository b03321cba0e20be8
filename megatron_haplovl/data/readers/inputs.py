"""Which files `--input` names, and which reader reads each of them."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_haplovl.data.natural_order import natural_key
from megatron_haplovl.data.readers.json_array import count_json, read_json
from megatron_haplovl.data.readers.json_lines import count_json_lines, read_json_lines
from megatron_haplovl.data.readers.tables import count_arrow, count_parquet, read_arrow, read_parquet
from megatron_haplovl.data.readers.tar_shards import count_tar, read_tar
from megatron_haplovl.data.records import RawRecord


@dataclass(frozen=True)
class FileKind:
    """How the files of one kind are read."""

    suffixes: tuple[str, ...]
    """What their names end in, in small letters."""
    read: Callable[[Path, int], Iterator[RawRecord]]
    """Records from a number on, those before it not parsed where the kind of file allows it: lines, row groups and
    members of tar files are skipped, a list is read. `location` names the place in the file."""
    count: Callable[[Path], int]
    """Number of records."""
    is_found_in_folders: bool = True
    """Whether a folder is searched for them. `.json` is not, because data set folders hold other JSON files."""


FILE_KINDS = (
    FileKind((".json", ".json.gz", ".json.zst"), read_json, count_json, is_found_in_folders=False),
    FileKind((".jsonl", ".jsonl.gz", ".jsonl.zst"), read_json_lines, count_json_lines),
    FileKind((".parquet",), read_parquet, count_parquet),
    FileKind((".arrow",), read_arrow, count_arrow),
    FileKind((".tar", ".tar.gz", ".tgz", ".tar.zst"), read_tar, count_tar),
)
"""Every kind of file that records are read from."""

_SUFFIXES = tuple(suffix for kind in FILE_KINDS for suffix in kind.suffixes)
_SPLITS = ("train", "validation", "valid", "val", "dev", "test")


def find_inputs(given: Sequence[str | Path]) -> tuple[Path, ...]:
    """The files that inputs name, in the order of the inputs, those of one input in natural order.

    An input is a file, a glob (`**` goes into folders), or a folder: one that `save_to_disk` wrote, or a hub's data set
    folder, of which the files of the train split are taken.

    Raises:
        ValueError: an input or a glob names no file, a folder has no data files or several kinds of them, a file has a
            suffix that is not read, or is named twice.
    """
    files: list[Path] = []
    for one in given:
        for path in _expand(str(one)):
            files += _files_of_folder(path) if path.is_dir() else [path]
    for number, path in enumerate(files):
        kind_of(path)
        if path in files[:number]:
            raise ValueError(f"{path} is given twice as an input")
    return tuple(files)


def _expand(given: str) -> list[Path]:
    if Path(given).exists():
        return [Path(given)]
    if not glob.has_magic(given):
        raise ValueError(f"{given} does not exist")
    found = sorted(map(Path, glob.glob(given, recursive=True)), key=natural_key)
    if not found:
        raise ValueError(f"no file matches the input {given!r}")
    return found


def kind_of(path: Path) -> FileKind:
    """The kind of a file, by its suffix.

    Raises:
        ValueError: no kind has this suffix.
    """
    for kind in FILE_KINDS:
        if path.name.lower().endswith(kind.suffixes):
            return kind
    raise ValueError(f"{path} must end in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}")


def _files_of_folder(folder: Path) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        if not (folder / "train").is_dir():
            raise ValueError(f"{folder} holds a data set without a train split; give one of its folders")
        return _files_of_folder(folder / "train")
    if (folder / "state.json").is_file():
        return [folder / name for name in _names_in_state(folder / "state.json")]
    found: dict[FileKind, list[Path]] = {}
    for path in sorted(folder.rglob("*"), key=natural_key):
        inside = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in inside.parts):
            for kind in FILE_KINDS:
                if kind.is_found_in_folders and path.name.lower().endswith(kind.suffixes):
                    found.setdefault(kind, []).append(path)
    if len(found) != 1:
        there = " and ".join(files[0].name for files in found.values())
        problem = f"holds several kinds of data files, such as {there}" if found else "holds no data files"
        raise ValueError(f"the folder {folder} {problem}; give the files themselves, or a glob")
    (files,) = found.values()
    splits = {path: _split_of(path.relative_to(folder)) for path in files}
    if set(splits.values()) == {None}:
        return files
    train = [path for path in files if splits[path] == "train"]
    if not train:
        raise ValueError(f"the folder {folder} has no files of a train split, only such as {files[0].name}")
    return train


def _names_in_state(path: Path) -> list[str]:
    """The files of a folder that `save_to_disk` wrote, as its own list orders them."""
    try:
        return [entry["filename"] for entry in json.loads(path.read_text(encoding="utf-8"))["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not list the files of a data set: {type(error).__name__} {error}") from error


def _split_of(inside: Path) -> str | None:
    """The split that a name begins with, the file's or a folder's: `train-00000-of-00002.parquet`, `test/0.parquet`."""
    for part in reversed(inside.parts):
        word = part.lower().replace("_", "-").replace(".", "-").partition("-")[0]
        if word in _SPLITS:
            return word
    return None


def read(inputs: Sequence[str | Path]) -> Iterator[RawRecord]:
    """The records of all inputs, in one fixed order.

    Args:
        inputs: as for :func:`find_inputs`.

    Returns:
        The records. A location is `line 7`, `index 7`, `row 7` or `member 000001`; with several files, the file's name
        stands before it.

    Raises:
        ValueError: as :func:`find_inputs`, at once; or, while it is iterated, a file is damaged or cut short.
    """
    return _read_files(find_inputs(inputs))


def _read_files(files: tuple[Path, ...]) -> Iterator[RawRecord]:
    for path in files:
        for raw in kind_of(path).read(path, 0):
            yield raw if len(files) == 1 else RawRecord(f"{path} {raw.location}", raw.value)
