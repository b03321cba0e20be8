"""Where every tensor of a model came from, as a table."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

NEW = "newly initialised"

# No pretrained model holds these, so they may start at random beside pretrained weights.
MAY_BE_NEW = re.compile(r"embedding\.(text_projector\.weight|image_newline)|connector\.weight|distillation\..*")


def provenance_table(origins: Iterable[tuple[str, str]]) -> str:
    """Count tensors by part of the model and origin.

    Args:
        origins: the name of every tensor, and where it came from or what became of it.
    """
    rows = Counter((name.split(".", 1)[0], origin) for name, origin in origins)
    width = max(len(part) for part, _ in rows)
    return "\n".join(f"  {part:<{width}}  {count:>5} tensors  {origin}" for (part, origin), count in rows.items())
