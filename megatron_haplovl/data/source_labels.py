"""What the log calls the sources of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from megatron_haplovl.data.plan.cache import SourceShare


def source_labels(main: Sequence[SourceShare], aux: Sequence[SourceShare]) -> tuple[str, ...]:
    """A name for each source, main ones first: the one that it was given, or the end of its prefix.

    Where two are the same, an auxiliary one is marked as such, and a number follows.
    """
    ends = _distinct_ends([share.source.name for share in (*main, *aux)])
    names = [share.label or end for share, end in zip((*main, *aux), ends, strict=True)]
    taken: set[str] = set()
    for place, name in enumerate(names):
        wanted = name if name not in taken or place < len(main) else f"{name} (aux)"
        number = 2
        while wanted in taken:
            wanted, number = f"{name} #{number}", number + 1
        names[place] = wanted
        taken.add(wanted)
    return tuple(names)


def _distinct_ends(prefixes: Sequence[str]) -> list[str]:
    """The last parts of paths, as many as it takes to tell different ones apart."""
    parts = [PurePath(prefix).parts for prefix in prefixes]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(set(parts)):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]
