"""Question files in the LLaVA format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_haplovl.data.readers.inputs import read
from megatron_haplovl.data.records import RawRecord, RecordError, resolve_image
from megatron_haplovl.data.tokenizer import IMAGE_MARK

UNTYPED = "all"
"""Type of questions in a file that names none."""


@dataclass(frozen=True)
class Question:
    """One question with its images and its true answer."""

    question_id: str
    text: str
    """The prompt, with one image mark for each image."""
    images: tuple[Path, ...]
    answer: str
    """Empty if the file gives none, where none is needed."""
    type: str


def load_questions(
    path: str | Path,
    image_folder: str | Path | None,
    *,
    needs_answers: bool = True,
    folder_flag: str = "--image-folder",
) -> list[Question]:
    """Read a `.jsonl` file (one question per line) or a `.json` file (a list).

    A question has `question_id` or `id` (default: its place in the file), `image` (a path or a list of paths;
    optional), and either `text` or `question` with `answer` or `label`, or `conversations` with one turn of each side.
    `type`, `category` or `question_type` names its kind. Images without a mark in the text are put before it.

    Args:
        path: the file.
        image_folder: where the image paths begin; may be None if no question has an image.
        needs_answers: False if a question may come without its true answer.
        folder_flag: what gives the image folder, for messages.

    Raises:
        ValueError: the file cannot be read or is empty, or a question lacks its text or its answer, names an image that
            is missing or outside the folder, or has marks that do not match its images. The message names the place.
    """
    path = Path(path)
    folder = None
    if image_folder is not None:
        folder = Path(image_folder).resolve()
        if not folder.is_dir():
            raise ValueError(f"{image_folder}: no such image folder")
    questions = []
    for raw in read([path]):
        try:
            questions.append(_parse(raw, folder, needs_answers, folder_flag))
        except ValueError as error:
            raise ValueError(f"{path}, {raw.location}: {error}") from error
    if not questions:
        raise ValueError(f"{path}: holds no questions")
    return questions


def _parse(raw: RawRecord, folder: Path | None, needs_answers: bool, folder_flag: str) -> Question:
    value = raw.value
    if isinstance(value, RecordError):
        raise value
    if not isinstance(value, dict):
        raise ValueError(f"a question must be an object, not {type(value).__name__}")
    text, answer = _conversation(value) if "conversations" in value else _fields(value)
    if not isinstance(text, str) or not text.strip():
        raise ValueError("the question has no text")
    answer = "" if answer is None else str(answer).strip()
    if needs_answers and not answer:
        raise ValueError("the question has no answer (`answer`, `label`, or a turn from gpt)")
    names = _image_names(value)
    if names and folder is None:
        raise ValueError(f"the question has the image {names[0]!r}, but no {folder_flag} is given")
    images = tuple(resolve_image(name, folder) for name in names) if folder is not None else ()
    marks = text.count(IMAGE_MARK)
    if marks == 0:
        text = f"{IMAGE_MARK}\n" * len(images) + text
    elif marks != len(images):
        raise ValueError(f"{marks} {IMAGE_MARK} marks in the text, {len(images)} images given")
    return Question(
        question_id=str(_first(value, ("question_id", "id"), raw.location)),
        text=text,
        images=images,
        answer=answer,
        type=str(_first(value, ("type", "category", "question_type"), UNTYPED)),
    )


def _first(value: Mapping[str, Any], names: tuple[str, ...], default: Any = None) -> Any:
    return next((value[name] for name in names if value.get(name) is not None), default)


def _fields(value: Mapping[str, Any]) -> tuple[Any, Any]:
    return _first(value, ("text", "question")), _first(value, ("answer", "label"))


def _conversation(value: Mapping[str, Any]) -> tuple[Any, Any]:
    turns = value["conversations"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("`conversations` is not a list of turns")
    asked = [turn.get("value") for turn in turns if turn.get("from") == "human"]
    answered = [turn.get("value") for turn in turns if turn.get("from") == "gpt"]
    if len(asked) != 1 or len(answered) > 1 or len(turns) != len(asked) + len(answered):
        speakers = [turn.get("from") for turn in turns]
        raise ValueError(f"`conversations` must hold one turn from human and one from gpt, not {speakers}")
    return asked[0], answered[0] if answered else _first(value, ("answer", "label"))


def _image_names(value: Mapping[str, Any]) -> list[str]:
    given = value.get("image")
    names = [] if given in (None, "") else [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"`image` must be a path or a list of paths, not {given!r}")
    return names
