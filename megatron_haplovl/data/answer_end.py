"""Refuse a chat template with which a model would never learn to stop.

A model stops because it writes what ends an answer: an end-of-sequence token, or the template's own `<|im_end|>` or
`<|eot_id|>`. It learns to write that only if it is trained. The rule: behind the last character of an answer, the first
special token must be trained. Where a template ends an answer without a special token (`plain` with a tokenizer that
has no end-of-sequence token), some token behind it must be.

Shape letters: N tokens of a conversation.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from megatron_haplovl.data.tokenizer import TextTokenizer

Rendered = tuple[str, list[tuple[int, int]]]
"""A text, and the character spans `[start, end)` in it that are generated."""

_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}.*?\{%-?\s*endgeneration\s*-?%\}", re.DOTALL)


def trained_tokens(offsets_N2: npt.NDArray[np.int64], spans: list[tuple[int, int]]) -> npt.NDArray[np.bool_]:
    """Which tokens are generated: those that share a character with a generated span, `[N]`."""
    trained = np.zeros(len(offsets_N2), dtype=bool)
    for start, end in spans:
        trained |= (offsets_N2[:, 0] < end) & (offsets_N2[:, 1] > start)
    return trained


def check_answer_end(name: str, source: str, render: Callable[[str], Rendered], tokenizer: TextTokenizer) -> None:
    """Render a question and an answer, and look at what follows the answer.

    Args:
        name: of the template, for the message.
        source: its text, for the message.
        render: from an answer to the conversation with it.
        tokenizer: the one that the template is used with.

    Raises:
        ValueError: the end of an answer would not be trained; the message shows the lines to change.
    """
    # Where the answer ends is where two conversations stop to differ, whatever the template does to the text.
    text, spans = render("b")
    other, _ = render("c")
    if text == other:
        raise ValueError(f"chat template {name!r} does not write the answers")
    end = len(text) - len(os.path.commonprefix([text[::-1], other[::-1]]))
    ids, offsets = tokenizer.encode(text)
    offsets_N2 = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    trained = trained_tokens(offsets_N2, spans)
    added = tokenizer.hf.added_tokens_decoder
    special = np.array([i in added and added[i].special for i in ids], dtype=bool)
    behind = offsets_N2[:, 1] > end
    ends = np.flatnonzero(behind & special)
    if trained[ends[0]] if len(ends) else (trained & behind).any():
        return
    what = repr(tokenizer.hf.convert_ids_to_tokens(ids[ends[0]])) if len(ends) else "anything"
    raise ValueError(
        f"chat template {name!r} does not train {what} behind an answer, so a model trained with it would never stop; "
        f"it writes {text[end:]!r} there; put the token that ends an answer in front of {{% endgeneration %}}:"
        + "".join(_lines_to_change(source))
    )


def _lines_to_change(source: str) -> list[str]:
    """The lines of the generated blocks, numbered, each behind a line break."""
    lines = source.splitlines()
    shown: list[str] = []
    for block in _BLOCK.finditer(source):
        first, last = (source.count("\n", 0, place) for place in block.span())
        shown += [f"\n  line {i + 1}: {lines[i].strip()}" for i in range(first, last + 1)]
    return shown
