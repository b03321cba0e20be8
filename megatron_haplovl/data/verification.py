"""Compare the files of a prefix with their manifest and with each other: nothing is trusted, everything is read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_haplovl.data import manifest as names
from megatron_haplovl.data.indexed_dataset import IndexedDataset
from megatron_haplovl.data.manifest import Manifest, load_manifest
from megatron_haplovl.data.verify_contents import ProblemList, check_contents, read_digests

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Finding:
    """What is wrong with one file, or with how the files fit together."""

    name: str
    """The file's name, or `contents`."""
    read: str
    """What was read, in words."""
    problems: tuple[str, ...]
    """Empty if nothing is wrong."""


def verify_prefix(prefix: str) -> Iterator[Finding]:
    """Check the manifest, then the checksum of each data file, then the contents.

    Args:
        prefix: path without suffix, as `--data-path` takes it.

    Yields:
        One finding for each file and one for the contents. If the manifest cannot be read, it is the only one.
    """
    path = Path(prefix + names.MANIFEST_SUFFIX)
    try:
        manifest = load_manifest(prefix)
    except ValueError as error:
        yield Finding(path.name, "nothing", (str(error),))
        return
    text = path.read_bytes()
    # A change between two values of a manifest changes no value. Before format 2, values have no checksum either.
    changed = manifest.format_version >= 2 and text != manifest.to_json().encode()
    yield Finding(path.name, f"{len(text)} bytes", ("it is not as a manifest is written",) if changed else ())
    for suffix in manifest.suffixes:
        yield _verify_file(prefix, suffix, manifest)
    try:
        problems = check_contents(prefix, manifest)
    except ValueError as error:
        problems = (f"they cannot be read: {error}",)
    yield Finding("contents", f"{manifest.counts.samples} samples", problems)


def _verify_file(prefix: str, suffix: str, manifest: Manifest) -> Finding:
    path = Path(prefix + suffix)
    if suffix not in manifest.files:
        return Finding(path.name, "nothing", ("the manifest does not list it",))
    if not path.is_file():
        return Finding(path.name, "nothing", ("it is missing",))
    size, entry = path.stat().st_size, manifest.files[suffix]
    read = f"{size} bytes"
    if size != entry.bytes:
        return Finding(path.name, read, (f"the manifest says {entry.bytes} bytes",))
    if suffix == f"{names.IMAGES}.bin" and manifest.format_version >= 2:
        return Finding(path.name, read, _verify_images(prefix, size, entry.sha256))
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    same = digest.hexdigest() == entry.sha256
    return Finding(path.name, read, () if same else (f"its SHA-256 is {digest.hexdigest()}, not {entry.sha256}",))


def _verify_images(prefix: str, size: int, expected: str) -> tuple[str, ...]:
    """Hash every image. The manifest has the hash of all digests, which stand in a file of their own."""
    try:
        images = IndexedDataset(prefix + names.IMAGES)
        covered = images.check_order()
    except ValueError as error:
        return (f"its images cannot be found: {error}",)
    if covered != size:
        return (f"its images have {covered} bytes together, the file {size}",)
    digests = [hashlib.sha256(images[number].data).digest() for number in range(len(images))]
    if hashlib.sha256(b"".join(digests)).hexdigest() == expected:
        return ()
    problems = ProblemList()
    try:
        stored_I32 = read_digests(prefix, len(images))
    except ValueError:  # the digests' own file is a finding of its own
        stored_I32 = np.zeros((0, 32), dtype=np.uint8)
    for number, (digest, stored) in enumerate(zip(digests, stored_I32, strict=False)):
        if digest != stored.tobytes():
            problems.add(f"image {number} is not what was written: its SHA-256 is {digest.hex()}")
    return problems.all() or ("the SHA-256 over its images' digests is not the manifest's",)
