"""Sentences about ranks that keep others waiting."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_haplovl.operation.beats import Beat
from megatron_haplovl.operation.judgement import Finding

_NAMED = 4
"""Ranks that a sentence names; of more it says how many there are."""


def warning(finding: Finding, folder: object) -> str:
    """What is said when the suspicion comes up. The run goes on.

    Args:
        finding: the suspicion.
        folder: where every rank's stack is.
    """
    return f"{_what(finding)}{_who_waits(finding)}; every rank's stack is in {folder}"


def sentence(finding: Finding, folder: object, timeout: float, flag: str) -> str:
    """What is said when the run ends because of it.

    Args:
        finding: what keeps the run from going on.
        folder: where every rank's stack is.
        timeout: seconds that a collective may take.
        flag: where the timeout comes from.
    """
    return (
        f"{_what(finding)}{_who_waits(finding)}, and {flag} allows {timeout:.0f} s; every rank's stack is in {folder}; "
        "the same command goes on from the last checkpoint"
    )


def goes_on(finding: Finding) -> str:
    """What is said when the suspicion was wrong, or what caused it is over."""
    if not finding.culprits:
        return "the ranks go on"
    return f"{_ranks(finding.culprits)} {'goes' if len(finding.culprits) == 1 else 'go'} on"


def gone(beat: Beat) -> str:
    """About a rank whose connections have ended without a word."""
    return f"{beat.who()} is gone without a word; it was last seen in {beat.where()}"


def _what(finding: Finding) -> str:
    culprits = list(finding.culprits[:_NAMED])
    more = len(finding.culprits) - len(culprits)
    ends = {
        "silent": "has not answered for {0:.0f} s (it is stopped, or its machine is gone); it was last seen in {1}",
        "stuck": "has not moved for {0:.0f} s in {1}",
        "busy": "has been for {0:.0f} s in {1}",
        "behind": "has waited for {0:.0f} s in {1}, behind the others",
        "left": "has ended already, after {1}",
    }
    if finding.kind == "all":
        place = finding.waiting[0]
        return f"all ranks have waited for one another for {finding.seconds:.0f} s, in {place.where()}"
    words = [f"{beat.who()} {ends[finding.kind].format(finding.seconds, beat.where())}" for beat in culprits]
    return ", ".join(words) + (f", and {more} more" if more else "")


def _who_waits(finding: Finding) -> str:
    if finding.kind == "all" or not finding.waiting:
        return ""
    verb = "has" if len(finding.waiting) == 1 else "have"
    place = finding.waiting[0].where()
    return f"; {_ranks(finding.waiting)} {verb} waited {finding.waited:.0f} s for it in {place}"


def _ranks(beats: Sequence[Beat]) -> str:
    if len(beats) > _NAMED:
        return f"{len(beats)} other ranks"
    return ("rank " if len(beats) == 1 else "ranks ") + ", ".join(str(beat.rank) for beat in beats)
