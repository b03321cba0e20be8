"""Runs on a small real prefix."""

from __future__ import annotations

from tests.faults.run import command


def words(launcher: str, prefix: str, *flags: str) -> list[str]:
    """The words that start a run of two ranks on a prefix."""
    found = command(launcher, 2, "finetune", ["--data-path", prefix, "--allow-missing", ".*", *flags])
    return [word for word in found if word != "--mock-data"]
