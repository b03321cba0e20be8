"""The manifest of a checkpoint: every file with its size and SHA-256, every parameter with its shape."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_haplovl.config.files import read_json

MANIFEST = "manifest.json"


def damaged_files(folder: Path, share: int = 0, shares: int = 1) -> list[str]:
    """What is wrong with the files of a checkpoint; every rank may look at a share of them.

    Raises:
        ValueError: there is no readable manifest.
    """
    found = []
    for record in read_manifest(folder)["files"][share::shares]:
        path = folder / record["file"]
        if not path.is_file():
            found.append(f"{path} is missing")
        elif path.stat().st_size != record["bytes"]:
            found.append(f"{path} has {path.stat().st_size} bytes instead of {record['bytes']}")
        elif _digest(path) != record["sha256"]:
            found.append(f"{path} has changed since it was written (its SHA-256 is another)")
    return found


def file_record(path: Path) -> dict[str, Any]:
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": _digest(path)}


def read_manifest(folder: Path) -> dict[str, Any]:
    manifest = read_json(folder / MANIFEST)
    # Manifests of earlier versions have no digest.
    if manifest.pop("sha256", None) not in (None, manifest_digest(manifest)):
        raise ValueError(f"{folder / MANIFEST} has changed since it was written (its SHA-256 is another)")
    return manifest


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
