"""Which ranks share a machine's own disk, found by looking: every rank leaves a file there, and sees whose it finds."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from megatron_haplovl.parallel.groups import Group


@dataclass(frozen=True)
class Machines:
    """Sets of ranks that see the same local folder."""

    lead: int
    """The first rank of this one."""
    leads: tuple[int, ...]
    """The first rank of every one."""

    def is_lead(self, rank: int) -> bool:
        """Whether a rank is the first on its machine."""
        return rank in self.leads


def find_machines(root: Path, control: Group, run_id: str) -> Machines:
    """Sort the ranks by the folder that they see. Called by every rank.

    Args:
        root: the folder, made if there is none.
        control: all ranks.
        run_id: keeps apart what killed runs have left.

    Raises:
        ValueError: a rank cannot write there.
    """
    mine = root / f".rank-{control.rank:05d}-{run_id}"

    def place() -> None:
        try:
            root.mkdir(parents=True, exist_ok=True)
            mine.touch()
        except OSError as error:
            raise ValueError(
                f"--non-persistent-local-ckpt-dir: nothing can be written to {root} ({error}); give a folder on this "
                "machine's own disk"
            ) from error

    control.together(place)
    seen = sorted(int(path.name.split("-")[1]) for path in root.glob(f".rank-*-{run_id}"))
    leads = control.gather_objects(seen[0])
    with contextlib.suppress(OSError):
        mine.unlink()
    return Machines(seen[0], tuple(sorted(set(leads))))
