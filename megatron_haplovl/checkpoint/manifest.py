"""The manifest of a checkpoint: every file with its size and SHA-256, every parameter with its shape."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_haplovl.checkpoint.manifest_check import checked_manifest
from megatron_haplovl.checkpoint.safetensors_stream import read_metadata
from megatron_haplovl.checkpoint.state import CONFIG_FILE, STATE_FILE
from megatron_haplovl.config.files import read_json

MANIFEST = "manifest.json"


def damaged_files(folder: Path, share: int = 0, shares: int = 1) -> list[str]:
    """What is wrong with the files of a checkpoint; every rank may look at a share of them.

    Raises:
        ValueError: there is no readable manifest.
    """
    manifest = read_manifest(folder)
    digests = {record["file"]: record["sha256"] for record in manifest["files"]}
    found = []
    for record in manifest["files"][share::shares]:
        path = folder / record["file"]
        if not path.is_file():
            found.append(f"{path} is missing")
        elif path.stat().st_size != record["bytes"]:
            found.append(f"{path} has {path.stat().st_size} bytes instead of {record['bytes']}")
        elif file_digest(path) != record["sha256"]:
            found.append(f"{path} has changed since it was written (its SHA-256 is another)")
        elif (other := _other_run(path, manifest.get("run_id"), digests)) is not None:
            found.append(other)
    return found


def _other_run(path: Path, run_id: str | None, digests: Mapping[str, str]) -> str | None:
    """Whether a file that is whole was written by another run than the manifest; earlier versions wrote no ids."""
    if path.suffix == ".safetensors":
        run, config = read_metadata(path).get("run_id"), None
    elif path.name == STATE_FILE:
        state = read_json(path)
        run, config = state.get("run_id"), state.get("config_sha256")
    else:
        return None
    if run != run_id:
        return f"{path} is of the run {run}, but {MANIFEST} of the run {run_id}"
    if config not in (None, digests.get(CONFIG_FILE)):
        return f"{path} was written with another {CONFIG_FILE} than the one beside it"
    return None


def file_record(path: Path) -> dict[str, Any]:
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": file_digest(path)}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, of whose entries every type, name, place and size has been checked.

    Raises:
        ValueError: it is missing, has changed, or says something that cannot be.
    """
    path = folder / MANIFEST
    manifest = read_json(path)
    # Manifests of earlier versions have no digest.
    if manifest.pop("sha256", None) not in (None, manifest_digest(manifest)):
        raise ValueError(f"{path} has changed since it was written (its SHA-256 is another)")
    return checked_manifest(manifest, path)


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
