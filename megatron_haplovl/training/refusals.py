"""How a run that cannot begin ends."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def refusals_in_one_line() -> Iterator[None]:
    """If a check of this package refuses something, end the process with a sentence and not with a traceback.

    A ValueError that was raised elsewhere (in torch, in DeepSpeed) keeps its traceback.

    Raises:
        SystemExit: with status 1.
    """
    try:
        yield
    except ValueError as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        if not raised_in.is_relative_to(_PACKAGE):
            raise
        sys.exit(f"error: {error}")
