"""Copies of checkpoints on the machines' own disks: each machine holds the files of its own ranks.

LOCAL/NAME-OF-SAVE-1f2e3d4c5b6a/global_step120/     as in `checkpoint.folders`, without other machines' tensors
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_haplovl.checkpoint.exchange import plan_shipments, ship
from megatron_haplovl.checkpoint.folders import complete_checkpoints, step_of, unfinished
from megatron_haplovl.checkpoint.machines import Machines
from megatron_haplovl.checkpoint.manifest import MANIFEST, damaged_files, file_record, read_manifest
from megatron_haplovl.checkpoint.write import give_name
from megatron_haplovl.parallel.groups import Group

logger = logging.getLogger(__name__)


def local_root(directory: str, save: str) -> Path:
    """Where the copies of one --save folder lie in --non-persistent-local-ckpt-dir, which runs may share."""
    whole = Path(save).resolve()
    return Path(directory) / f"{whole.name}-{hashlib.sha256(str(whole).encode()).hexdigest()[:12]}"


def newest_copy(root: Path, machines: Machines, control: Group, newer_than: int) -> Path | None:
    """The newest copy that the machines hold together, made whole on each of them. Called by every rank.

    Args:
        root: see :func:`local_root`.
        machines: who shares a folder.
        control: all ranks; what a machine lacks is sent over it.
        newer_than: steps of the newest checkpoint in --save; copies up to it are of no use.

    Returns:
        The copy's folder, or None if there is no whole one, which is then said in the log.
    """
    found = control.gather_objects(_copies(root) if machines.is_lead(control.rank) else {})
    candidates = {(step, digest) for copies in found for step, digest in copies.items() if step > newer_than}
    for step, digest in sorted(candidates, reverse=True):
        folder = root / f"global_step{step}"
        error = _complete(folder, digest, machines, control)
        if not error:
            return folder
        logger.warning(f"the local copy {folder} is not used: {error}")
    return None


def remove_copies(root: Path, kept: Path | None) -> None:
    """Remove all copies but one, and what was left unfinished. Called by the first rank of a machine."""
    for old in [*root.glob("global_step*"), *root.glob(".global_step*")]:
        if old != kept:
            with contextlib.suppress(OSError):
                shutil.rmtree(old)


def _copies(root: Path) -> dict[int, str]:
    """Step -> SHA-256 of the manifest, of this machine's copies."""
    return {step_of(folder): file_record(folder / MANIFEST)["sha256"] for folder in complete_checkpoints(root)}


def _complete(folder: Path, digest: str, machines: Machines, control: Group) -> str:
    """Send every machine what it lacks of a copy.

    Returns:
        Why that could not be done, the same on every rank; or nothing.
    """
    is_lead = machines.is_lead(control.rank)
    wanted, whole = _whole_files(folder, digest) if is_lead else ({}, set())
    answers = control.gather_objects((wanted, whole))
    files: Mapping[str, Mapping[str, Any]] = next((files for files, _ in answers if files), {})
    held = {rank: answers[rank][1] for rank in machines.leads}
    if missing := sorted(set(files) - set().union(*held.values())):
        return (
            f"{missing[0]} is whole on none of the {len(held)} machines ({len(missing)} of {len(files)} files are not)"
        )
    if not files:
        return "its manifest cannot be read"
    # A machine that has nothing of it, or another run's of the same step, gets all of it under the name of a new one.
    target = folder if held.get(control.rank) else unfinished(folder)
    error = ""
    if is_lead and target != folder:
        error = _make(target)
    if not any(control.gather_objects(error)):
        shipments = plan_shipments(files, held)
        if shipments and control.rank == 0:
            size = sum(size for shipment in shipments.values() for _, size, _ in shipment.files)
            logger.info(f"{folder.name}: sending {size:,} bytes between {len(held)} machines")
        error = ship(target, shipments, machines.leads, control)
        if is_lead and not error and target != folder:
            error = _rename(target, folder)
    return next((error for error in control.gather_objects(error) if error), "")


def _whole_files(folder: Path, digest: str) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """Every file of a copy with its record, the manifest too; and the names of those that this machine has, whole."""
    try:
        manifest = file_record(folder / MANIFEST)
        if manifest["sha256"] != digest:
            return {}, set()
        records = read_manifest(folder)["files"]
        damage = " ".join(damaged_files(folder))
    except (OSError, ValueError):
        return {}, set()
    files = {record["file"]: {"bytes": record["bytes"], "sha256": record["sha256"]} for record in records}
    whole = {name for name in files if f"{folder / name} " not in damage}
    return {**files, MANIFEST: manifest}, {*whole, MANIFEST}


def _make(folder: Path) -> str:
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        return str(error)
    return ""


def _rename(aside: Path, folder: Path) -> str:
    try:
        give_name(aside, folder)
    except OSError as error:
        return str(error)
    return ""
