"""Runs on a small real prefix, and what is done to its files."""

from __future__ import annotations

from pathlib import Path

from megatron_haplovl.data.sources import IndexedSource
from tests.faults.run import command


def words(launcher: str, prefix: str, *flags: str) -> list[str]:
    """The words that start a run of two ranks on a prefix."""
    found = command(launcher, 2, "finetune", ["--data-path", prefix, "--allow-missing", ".*", *flags])
    return [word for word in found if word != "--mock-data"]


def damage_image(prefix: str, number: int) -> None:
    """Overwrite the end of an image, so that it cannot be decoded."""
    path, images = Path(f"{prefix}_images.bin"), IndexedSource(prefix)._images
    end = int((images.starts() + images.lengths)[number])
    content = bytearray(path.read_bytes())
    content[end - 40 : end] = bytes(40)
    path.write_bytes(content)
