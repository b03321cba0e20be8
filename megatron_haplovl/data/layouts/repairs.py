"""Named repairs of records: what `--repairs` allows. A repair that is not allowed makes its record an error."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_haplovl.data.records import Reason, RecordError

REPAIRS = {
    "drop_leading_answer": "answers before the first question are left out",
    "drop_trailing_question": "a question behind the last answer is left out",
    "join_turns": "turns of one side that follow each other become one, with a line break between them",
    "mark_to_front": "a question's only image or video comes before its text",
    "add_missing_mark": "what `image`, `images`, `video` or `videos` gives without marks comes before the text",
    "drop_missing_image": "an image of a document that is not there is left out",
    "sample_id": "`sample_id` or `question_id` serves as `id`",
    "literal_mark": "a mark at the edge of a question stays text where the record has no image or video",
}
"""Every repair, and what it does."""

LLAVA = frozenset(REPAIRS) - {"literal_mark"}
"""What LLaVA's own training code does, or would do if it did not stop; `--repairs llava`."""

_SETS = {"llava": LLAVA, "none": frozenset[str]()}


def parse_repairs(text: str) -> frozenset[str]:
    """The repairs that `llava`, `none`, or a list such as `llava,literal_mark` names.

    Raises:
        ValueError: a name is unknown.
    """
    allowed: frozenset[str] = frozenset()
    for name in text.split(","):
        if name not in REPAIRS and name not in _SETS:
            raise ValueError(f"{name!r} is none of {', '.join((*_SETS, *REPAIRS))}")
        allowed |= _SETS.get(name, {name})
    return allowed


class Mending:
    """The repairs that a record may have, and those that it had."""

    def __init__(self, allowed: Iterable[str]) -> None:
        self._allowed = frozenset(allowed)
        self._used: dict[str, None] = {}

    @property
    def used(self) -> tuple[str, ...]:
        """Names of the repairs, each once, in the order of their first use."""
        return tuple(self._used)

    def allows(self, name: str) -> bool:
        """Whether a repair may be used."""
        return name in self._allowed

    def use(self, name: str, reason: Reason, problem: str) -> None:
        """Note that a problem is repaired.

        Raises:
            RecordError: the repair is not allowed.
        """
        if name not in self._allowed:
            raise RecordError(reason, f"{problem}; `--repairs {name}` would mend it: {REPAIRS[name]}")
        self._used[name] = None
