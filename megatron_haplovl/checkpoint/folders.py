"""Names in a --save folder, and which checkpoint a path means.

SAVE/global_step100/               a checkpoint; a folder with such a name is always complete
    manifest.json, rank-*.safetensors    weights and optimizer state; see `checkpoint.pieces`
    config.json                    settings, and the iteration
    training_state.json            the position in the data
SAVE/latest                        "global_step100", written last
SAVE/latest_checkpointed_iteration.txt
"""

from __future__ import annotations

import re
from pathlib import Path

from megatron_haplovl.checkpoint.manifest import MANIFEST
from megatron_haplovl.checkpoint.names import plain_name
from megatron_haplovl.checkpoint.typed import Fields
from megatron_haplovl.config.files import read_json

_STEP_FOLDER = re.compile(r"global_step(\d+)")
_UNFINISHED, _REPLACED = ".unfinished", ".replaced"


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
    # Bytes that are no text become characters that no name can have.
    name = plain_name(latest.read_text(encoding="utf-8", errors="surrogateescape").strip(), str(latest))
    if not (path / name).is_dir():
        raise ValueError(f"{latest}: names the checkpoint {name!r}, but {path / name} is missing")
    return path / name


def complete_checkpoints(root: Path, up_to: Path | None = None) -> list[Path]:
    """The checkpoints of a --save folder, newest first.

    Args:
        root: the folder.
        up_to: leave out later steps than this one's, which a run wrote before it was taken back to this checkpoint.
    """
    found = {int(match[1]): path for path in root.iterdir() if (match := _STEP_FOLDER.fullmatch(path.name))}
    steps = sorted((step for step in found if (found[step] / MANIFEST).is_file()), reverse=True)
    last = None if up_to is None else _STEP_FOLDER.fullmatch(up_to.name)
    return [found[step] for step in steps if last is None or step <= int(last[1])]


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix("global_step"))


def read_iteration(checkpoint: str | Path) -> int:
    """Optimizer steps that the model of a `global_stepN` folder has seen.

    Raises:
        ValueError: config.json is missing or does not say.
    """
    path = Path(checkpoint) / "config.json"
    return Fields(read_json(path), str(path)).count("iteration")


def unfinished(folder: Path) -> Path:
    """Where a checkpoint is written until it is complete and gets its name."""
    return folder.with_name(f".{folder.name}{_UNFINISHED}")


def replaced(aside: Path) -> Path:
    """Where an old checkpoint lies while a new one of the same step takes its name.

    Args:
        aside: see :func:`unfinished`.
    """
    return aside.with_name(f"{aside.name}{_REPLACED}")


def restore_replaced(root: Path) -> None:
    """Give a checkpoint its name back if the run was killed while another one was to replace it."""
    for replaced in root.glob(f".*{_UNFINISHED}{_REPLACED}"):
        folder = root / replaced.name.removeprefix(".").removesuffix(f"{_UNFINISHED}{_REPLACED}")
        if not folder.exists():
            replaced.rename(folder)
