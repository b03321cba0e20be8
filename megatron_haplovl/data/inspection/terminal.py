"""A sample in the terminal: trained tokens in colour, images and videos in one line each."""

from __future__ import annotations

import re

from megatron_haplovl.data.inspection.view import SampleView, TextRun

_TRAINED, _VISUAL, _PLAIN = "\033[1;32m", "\033[36m", "\033[0m"
# Texts are somebody else's: an escape sequence in one could write anywhere on the screen. Also what turns text around.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def show_sample(view: SampleView, *, is_coloured: bool) -> str:
    """The sample as lines of text.

    Args:
        view: the sample.
        is_coloured: whether trained text is green; otherwise it stands in double brackets.
    """
    trained, visual, plain = (_TRAINED, _VISUAL, _PLAIN) if is_coloured else ("[[", "", "]]")
    pieces = [f"{view.title}: {view.summary}\n\n"]
    for run in view.runs:
        if isinstance(run, TextRun):
            text = harmless(run.text)
            pieces.append(f"{trained}{text}{plain}" if run.is_trained else text)
        else:
            pieces.append(f"{visual}<{run.description}>{plain if is_coloured else ''}")
    return "".join(pieces)


def harmless(text: str) -> str:
    """The text with control characters, except tabs and line breaks, written out."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match.group()):02x}", text)
