"""What a rank that ends tells the others: why, and what they shall do before they end, too."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from megatron_haplovl.operation.endings import Ending, ExitCode


@dataclass(frozen=True)
class Published:
    """An ending as it stands in the store."""

    ending: Ending
    is_hang: bool = False
    """Whether every rank writes down its stacks before it ends."""
    abort: tuple[tuple[str, int], ...] = ()
    """(machine, process) of ranks that are stopped; a live rank of the same machine ends them."""

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def of_json(text: str) -> Published:
        """The opposite of :meth:`to_json`."""
        fields = json.loads(text)
        ending = fields.pop("ending")
        ending["code"] = ExitCode(ending["code"])
        fields["abort"] = tuple((host, pid) for host, pid in fields["abort"])
        return Published(Ending(**ending), **fields)
