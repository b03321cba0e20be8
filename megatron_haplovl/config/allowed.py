"""Names of tensors that a user allows to be missing or left over."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Allowed:
    """What a source of weights may lack or hold beyond what its format allows: regular expressions of whole names.

    Raises:
        ValueError: a pattern is not a regular expression.
    """

    missing: Sequence[str] = ()
    """Names of our parameters (--allow-missing)."""
    unexpected: Sequence[str] = ()
    """Names of the source's tensors (--allow-unexpected)."""

    def __post_init__(self) -> None:
        for flag, patterns in (("--allow-missing", self.missing), ("--allow-unexpected", self.unexpected)):
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(f"{flag} {pattern}: not a regular expression ({error})") from error

    def lacks(self, name: str) -> bool:
        """Whether a parameter may be missing."""
        return any(re.fullmatch(pattern, name) for pattern in self.missing)

    def skips(self, name: str) -> bool:
        """Whether a tensor may be left over."""
        return any(re.fullmatch(pattern, name) for pattern in self.unexpected)


STRICT = Allowed()
