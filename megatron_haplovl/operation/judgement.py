"""Who keeps the others waiting: a function of the ranks' beats and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_haplovl.operation.beats import Beat, Seen

Kind = Literal["silent", "stuck", "busy", "behind", "left", "all"]
"""silent: no beat arrives. stuck: the main thread does not move and waits for nobody. busy: it moves, but the others
have waited for long. behind: all wait for one another, and it is not as far as the others. left: it has ended already.
all: all wait at the same place."""


@dataclass(frozen=True)
class Limits:
    """Seconds after which something is said or done."""

    end: float
    """Of waiting, after which the run ends; below the timeout of the collectives."""
    silent: float = 12.0
    """Without a beat."""
    still: float = 20.0
    """Without a move, and of waiting."""
    busy: float = 60.0
    """Of waiting for a rank that moves."""
    unsettled: float = 3.0
    """Factor for a rank that is in its first step."""

    def is_silent(self, age: float) -> bool:
        """Whether a beat of this age is the last one."""
        return age >= min(self.silent, self.end)


@dataclass(frozen=True)
class Finding:
    """What keeps the run from going on."""

    kind: Kind
    culprits: tuple[Beat, ...]
    """By rank; none for kind "all"."""
    seconds: float
    """Silence or standstill of the culprits."""
    waiting: tuple[Beat, ...]
    """By rank."""
    waited: float
    """Seconds that the first of them has waited."""
    lasted: float
    """Seconds of the hang; the run ends when they pass `Limits.end`."""

    @property
    def episode(self) -> tuple[Kind, tuple[int, ...]]:
        """Equal for findings that are one and the same event."""
        return self.kind, tuple(beat.rank for beat in self.culprits)


def judge(seen: Sequence[Seen], limits: Limits) -> Finding | None:
    """Who keeps the others waiting, if anybody does.

    Args:
        seen: the last beat of every rank.
        limits: from when on it is worth a word.

    Returns:
        None while there is nothing to say.
    """
    staying = [one for one in seen if not one.beat.left]
    silent = [one for one in staying if limits.is_silent(one.age)]
    present = [one for one in staying if one not in silent]
    if silent:
        waiting = [one for one in present if one.beat.waits or one.quiet >= limits.still]
        return _finding("silent", silent, waiting, max(one.age for one in silent), limits)
    inside = [one for one in present if one.beat.waits]
    outside = [one for one in present if not one.beat.waits]
    if inside and outside:
        return _waited_for(inside, outside, limits)
    if inside:
        return _all_wait(inside, [one for one in seen if one.beat.left], limits)
    return _behind_device(outside, limits)


def _waited_for(inside: list[Seen], outside: list[Seen], limits: Limits) -> Finding | None:
    """Some wait in collectives; those outside that are furthest behind keep them waiting."""
    waited = max(one.quiet for one in inside)
    first = _furthest_behind(outside)
    still = [one for one in first if one.quiet >= _patience(one, limits)]
    if waited >= min(limits.still, limits.end) and still:
        return _finding("stuck", still, inside, min(one.quiet for one in still), limits)
    if waited >= min(limits.busy * (1.0 if _settled(first) else limits.unsettled), limits.end):
        return _finding("busy", first, inside, min(one.beat.in_phase for one in first), limits)
    return None


def _all_wait(inside: list[Seen], left: list[Seen], limits: Limits) -> Finding | None:
    if any(one.quiet < _patience(one, limits) for one in inside):
        return None
    if left:
        return _finding("left", left, inside, min(one.age for one in left), limits)
    first = _furthest_behind(inside)
    if len(first) == len(inside):
        return _finding("all", [], inside, min(one.quiet for one in inside), limits)
    ahead = [one for one in inside if one not in first]
    return _finding("behind", first, ahead, min(one.quiet for one in first), limits)


def _behind_device(outside: list[Seen], limits: Limits) -> Finding | None:
    """Nobody is inside a collective. With collectives on a device, ranks wait for the device, ahead of a stuck one."""
    first = _furthest_behind(outside)
    ahead = [one for one in outside if one not in first]
    if not ahead or any(one.quiet < _patience(one, limits) for one in outside):
        return None
    return _finding("stuck", first, ahead, min(one.quiet for one in first), limits)


def _furthest_behind(ranks: list[Seen]) -> list[Seen]:
    position = min((one.beat.position for one in ranks), default=(0, 0))
    return [one for one in ranks if one.beat.position == position]


def _settled(ranks: list[Seen]) -> bool:
    return all(one.beat.settled for one in ranks)


def _patience(one: Seen, limits: Limits) -> float:
    return min(limits.end, limits.still * (1.0 if one.beat.settled else limits.unsettled))


def _finding(kind: Kind, culprits: list[Seen], waiting: list[Seen], seconds: float, limits: Limits) -> Finding:
    waited = max((one.quiet for one in waiting), default=0.0)
    # A rank may hang for a while before the others come to the collective in which they wait for it. Without a wait,
    # nothing hangs but the rank's watch.
    hangs = kind in ("silent", "stuck") and waited >= min(limits.still, limits.end)
    return Finding(
        kind,
        tuple(sorted((one.beat for one in culprits), key=lambda beat: beat.rank)),
        seconds,
        tuple(sorted((one.beat for one in waiting), key=lambda beat: beat.rank)),
        waited,
        max(waited, seconds) if hangs else waited,
    )
