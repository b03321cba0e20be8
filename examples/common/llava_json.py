"""Records in the LLaVA JSON format, which tools/preprocess_data.py reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def conversation(
    record_id: str, turns: Sequence[tuple[str, str]], *, image: str | None = None, context: str | None = None
) -> Record:
    """One record: (question, answer) turns about an image, or about a text that stands where the image would.

    Args:
        record_id: `id` of the record.
        turns: questions and answers, in order.
        image: path below the image folder; its `<image>` mark is put before the first question.
        context: text put before the first question.
    """
    lead = "" if context is None else context + "\n"
    if image is not None:
        lead = "<image>\n" + lead
    messages = []
    for number, (question, answer) in enumerate(turns):
        messages.append({"from": "human", "value": lead + question if number == 0 else question})
        messages.append({"from": "gpt", "value": answer})
    record: Record = {"id": record_id}
    if image is not None:
        record["image"] = image
    record["conversations"] = messages
    return record


def write_json(path: Path, records: Iterable[Record]) -> None:
    """Write records as a JSON list, one record to a line so that the file can be read and compared."""
    lines = ",\n".join(json.dumps(record) for record in records)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def write_json_lines(path: Path, records: Iterable[Record]) -> None:
    """Write records as JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
