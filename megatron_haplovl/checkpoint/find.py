"""Which checkpoint a run goes on from, or takes its weights from: chosen by one rank, seen and verified by all."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from megatron_haplovl.checkpoint.folders import complete_checkpoints, resolve_checkpoint, restore_replaced
from megatron_haplovl.checkpoint.manifest import MANIFEST, damaged_files
from megatron_haplovl.checkpoint.weight_files import INDEX_FILE, SINGLE_FILE
from megatron_haplovl.parallel.groups import Group

logger = logging.getLogger(__name__)


def find_resumable(
    path: str | Path, world: Group, *, allow_fallback: bool = False, is_ours: bool = True
) -> Path | None:
    """The checkpoint that a run goes on from; see :func:`find_checkpoint`.

    Returns:
        None if there is none yet.

    Raises:
        ValueError: as :func:`find_checkpoint`, or the checkpoint holds weights only.
    """
    candidates = _agree_on_candidates(path, world, allow_fallback, is_ours)
    if not candidates:
        return None
    folder = _first_whole(candidates, world, allow_fallback)
    if not (folder / MANIFEST).is_file():
        raise ValueError(
            f"{folder} holds weights only, so no run can go on from it; to start one, add --finetune, or give it as "
            "--pretrained-checkpoint"
        )
    return folder


def find_checkpoint(path: str | Path, world: Group, *, allow_fallback: bool = False, is_ours: bool = True) -> Path:
    """The newest checkpoint of a --save folder, or the one that a path names; its checksums are verified.

    Called by every rank; they share the work. A checkpoint that was imported has no checksums.

    Args:
        path: see `resolve_checkpoint`.
        world: all ranks.
        allow_fallback: if the newest is damaged, take the newest one before it that is whole.
        is_ours: whether no other run can be writing there, so that what a killed one has left may be put in order.

    Raises:
        ValueError: there is no checkpoint, a rank does not see it, `latest` names a folder that is missing, or the
            newest checkpoint (with `allow_fallback`, every checkpoint) is damaged.
    """
    candidates = _agree_on_candidates(path, world, allow_fallback, is_ours)
    if not candidates:
        raise ValueError(f"{path}: there is no checkpoint")
    return _first_whole(candidates, world, allow_fallback)


def check_save_folder(root: str | Path, resumed: Path | None, world: Group) -> None:
    """Check, before a run begins, that its checkpoints can be written; warn if the folder holds another run's.

    Called by every rank.

    Args:
        root: --save.
        resumed: the checkpoint that the run goes on from.
        world: all ranks.

    Raises:
        ValueError: the folder cannot be written to.
    """
    root = Path(root)

    def write() -> list[Path]:
        if world.rank > 0:
            return []
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=root) as probe:
                probe.write(b"x")
            return complete_checkpoints(root)
        except OSError as error:
            raise ValueError(f"--save {root}: no checkpoint can be written there ({error})") from error

    found = world.together(write)
    if found and (resumed is None or resumed.parent.resolve() != root.resolve()):
        logger.warning(
            f"{root} holds checkpoints of another run, up to {found[0].name}; this run replaces them step by "
            f"step. To go on with that run, give --load {root}"
        )


def _agree_on_candidates(path: str | Path, world: Group, allow_fallback: bool, is_ours: bool) -> list[Path]:
    """The first rank's candidates, because another rank may see the folder later, or not at all."""
    mine = world.together(lambda: _candidates(Path(path), allow_fallback, is_ours) if world.rank == 0 else [])
    candidates: list[Path] = world.gather_objects(mine)[0]
    return candidates


def _candidates(path: Path, allow_fallback: bool, is_ours: bool) -> list[Path]:
    """The checkpoint to take and, with `allow_fallback`, those before it; empty if there is none yet."""
    if not path.is_dir():
        return []
    if is_ours:
        restore_replaced(path)
    if not (path / "latest").is_file() and not (path / "config.json").is_file():
        # The run was killed when its first checkpoint was complete but `latest` did not name it yet.
        found = complete_checkpoints(path)
        return found if allow_fallback else found[:1]
    try:
        newest = resolve_checkpoint(path)
    except ValueError:
        if allow_fallback and (found := complete_checkpoints(path)):
            return found
        raise
    if not allow_fallback:
        return [newest]
    return [newest, *(folder for folder in complete_checkpoints(newest.parent, up_to=newest) if folder != newest)]


def _first_whole(candidates: list[Path], world: Group, allow_fallback: bool) -> Path:
    first_damage = ""
    for folder in candidates:
        damage = [sentence for share in world.gather_objects(_damage(folder, world)) for sentence in share]
        if not damage:
            return folder
        if world.rank == 0:
            logger.warning(f"{folder} is damaged: {'; '.join(dict.fromkeys(damage))}")
        first_damage = first_damage or damage[0]
    others = (
        "and so is every one before it"
        if allow_fallback
        else "name another one (FOLDER/global_stepN), or give --allow-fallback with --load to take the newest whole one"
    )
    raise ValueError(f"{candidates[0]} is damaged ({first_damage}); {others}")


def _damage(folder: Path, world: Group) -> list[str]:
    """What this rank finds wrong with its share of the files."""
    if not folder.is_dir():
        return [f"rank {world.rank} does not see it; it must be on a file system that all ranks share"]
    if (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file():
        return []  # An imported checkpoint has no checksums.
    try:
        return damaged_files(folder, world.rank, world.size)
    except (ValueError, OSError) as error:
        return [str(error)]
