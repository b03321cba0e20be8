"""Chat templates: from messages to token ids and the mask of tokens that are trained.

A template is Jinja in the form of Hugging Face's chat templates. What lies between `{% generation %}` and
`{% endgeneration %}` is what the model learns to write; the loss mask comes from these marks alone, never from a search
for strings in the text.

Shape letters: N tokens of a conversation.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_haplovl.data.answer_end import Rendered, check_answer_end, trained_tokens
from megatron_haplovl.data.bounded import TooLongError, bounded
from megatron_haplovl.data.literal_marks import LiteralTokenizer, exchange, has_literal_mark
from megatron_haplovl.data.records import Image, Message, Reason, Record, RecordError, Video
from megatron_haplovl.data.tokenizer import IMAGE_MARK, VIDEO_MARK, TextTokenizer

_FOLDER = Path(__file__).parent / "templates"
TEMPLATE_NAMES = ("plain", "vicuna_v1", "llama3", "chatml")
"""Templates that come with the package."""

# SHA-256 of earlier texts of these templates. What they could render, today's text renders in the same way.
_EARLIER_TEXTS = {"plain": ("fbca264fb586a15ea4b1280d546aa9d1eef1d20635bb3075c0c89b3a299a69ee",)}  # without videos

RENDER_SECONDS = 10
"""Longest time that a template may take for one conversation; a usual one takes less than a millisecond."""
RENDER_BYTES = 1 << 30
"""Most memory that it may take for that."""
RENDER_CHARACTERS = 1 << 26
"""Longest text that it may make of one."""
# What a template's own mistakes end in: Jinja's errors, and Python's, which it hands on.
_TEMPLATE_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Tokens such as <|im_end|>, which a template writes and a tokenizer must know as one.
_CONTROL_MARK = re.compile(r"<\|[^|<>\s]+\|>")


@dataclass(frozen=True)
class ChatTemplate:
    """The text of a template. Made by :func:`load_chat_template`."""

    name: str
    source: str

    @property
    def sha256(self) -> str:
        """Hash of the text, for the manifest."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    def is_the_one_of(self, sha256: str) -> bool:
        """Whether data whose manifest names this template and this hash was made with it."""
        return sha256 in (self.sha256, *_EARLIER_TEXTS.get(self.name, ()))

    @property
    def control_marks(self) -> set[str]:
        """The control tokens, such as `<|im_end|>`, that the template writes."""
        return set(_CONTROL_MARK.findall(self.source))


def load_chat_template(name_or_path: str) -> ChatTemplate:
    """Load one of `TEMPLATE_NAMES`, or a `.jinja` file.

    Raises:
        ValueError: there is no such template, or it marks nothing as generated.
    """
    path = _FOLDER / f"{name_or_path}.jinja" if name_or_path in TEMPLATE_NAMES else Path(name_or_path)
    if not path.is_file():
        raise ValueError(f"chat template {name_or_path!r} is neither one of {TEMPLATE_NAMES} nor a file")
    source = path.read_text(encoding="utf-8")
    if not _GENERATION.search(source):
        raise ValueError(
            f"chat template {path} has no {{% generation %}} block, so nothing in it would be trained; put the answers "
            "between {% generation %} and {% endgeneration %}"
        )
    return ChatTemplate(name_or_path if name_or_path in TEMPLATE_NAMES else path.stem, source)


@dataclass(frozen=True)
class EncodedConversation:
    """Tokens of one sample."""

    token_ids: npt.NDArray[np.int32]
    """`[n]`; one placeholder token for every image and every video."""
    loss_mask: npt.NDArray[np.uint8]
    """`[n]`; 1 at every token that the model learns to write. The first token is never one of them."""


@dataclass(frozen=True)
class ConversationEncoder:
    """A tokenizer and a chat template that fit each other.

    Raises:
        ValueError: the template writes control tokens that the tokenizer does not know, cannot be rendered with it, or
            does not train what ends an answer.
    """

    tokenizer: TextTokenizer
    template: ChatTemplate

    def __post_init__(self) -> None:
        for mark in sorted(self.template.control_marks):
            if self.tokenizer.token_id(mark) is None:
                raise ValueError(
                    f"chat template {self.template.name!r} writes {mark!r}, which the tokenizer does not know as one "
                    "token; choose a template that fits the tokenizer"
                )
        try:
            check_answer_end(self.template.name, self.template.source, self._render_answer, self.tokenizer)
            self.encode(Record((Message("user", ("a",)), Message("assistant", ("b",)))))
        except RecordError as error:
            raise ValueError(f"chat template {self.template.name!r} does not fit the tokenizer: {error}") from error

    def _render_answer(self, answer: str) -> Rendered:
        return self.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}])

    @cached_property
    def _reserved(self) -> tuple[str, ...]:
        """Control tokens that a record must not write: those of the template, and the tokenizer's bos, eos and pad."""
        hf = self.tokenizer.hf
        tokens = {hf.bos_token, hf.eos_token, hf.pad_token} | self.template.control_marks
        return tuple(sorted(token for token in tokens if token))

    @cached_property
    def _literal_tokenizer(self) -> LiteralTokenizer:
        return LiteralTokenizer(self.tokenizer)

    def render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False) -> Rendered:
        """The text of a conversation and the character spans `[start, end)` that are generated.

        Raises:
            RecordError: the template refuses the messages.
        """
        hf = self.tokenizer.hf
        try:
            # A template is a program. Its sandbox keeps it from files, and neither from looping nor from memory.
            with bounded(RENDER_SECONDS, RENDER_BYTES):
                # It is declared to return a string, and returns (texts, spans).
                rendered: Any = render_jinja_template(
                    [messages],
                    chat_template=self.template.source,
                    return_assistant_tokens_mask=True,
                    add_generation_prompt=add_generation_prompt,
                    bos_token=hf.bos_token,
                    eos_token=hf.eos_token,
                )
        except TooLongError:
            raise RecordError(
                Reason.TEMPLATE, f"the template has not written the conversation in {RENDER_SECONDS} s; does it loop?"
            ) from None
        except MemoryError:
            raise RecordError(
                Reason.TEMPLATE, f"the template takes more than {RENDER_BYTES >> 20} MiB to write the conversation"
            ) from None
        except _TEMPLATE_ERRORS as error:
            raise RecordError(Reason.TEMPLATE, str(error) or type(error).__name__) from error
        texts, spans = rendered
        if len(texts[0]) > RENDER_CHARACTERS:
            raise RecordError(
                Reason.TEMPLATE,
                f"the template makes {len(texts[0])} characters of the conversation, more than {RENDER_CHARACTERS}",
            )
        return texts[0], [(int(start), int(end)) for start, end in spans[0]]

    def encode(self, record: Record) -> EncodedConversation:
        """Tokenize a record and mark what is trained.

        A mark that a text writes out stays text. A document is rendered without the template: the tokenizer's bos, its
        text and media, eos; all of it is trained.

        Raises:
            RecordError: a control token is written out in a text, the template drops or moves an image or a video, no
                token is trained, or the tokenizer cannot write a mark as text.
        """
        texts = ["".join(run) for message in record.messages for is_text, run in _runs(message) if is_text]
        for text in texts:
            for token in self._reserved:
                if token in text:
                    raise RecordError(Reason.RESERVED_TOKEN, f"the text contains the control token {token!r}")
        if any(map(has_literal_mark, texts)):
            for text in texts:
                self._literal_tokenizer.check(text)
            text, spans = self._render_record(record, exchange)
            ids, offsets = self._literal_tokenizer.encode(exchange(text))
        else:
            text, spans = self._render_record(record, str)
            ids, offsets = self.tokenizer.encode(text)
        token_ids = np.array(ids, dtype=np.int32)
        trained = trained_tokens(np.array(offsets, dtype=np.int64).reshape(-1, 2), spans)
        placeholder = np.isin(token_ids, self.tokenizer.placeholder_ids)
        trained &= ~placeholder
        trained[:1] = False

        kinds = {Image: self.tokenizer.image_token_id, Video: self.tokenizer.video_token_id}
        if token_ids[placeholder].tolist() != [kinds[type(medium)] for medium in record.media]:
            raise RecordError(
                Reason.TEMPLATE,
                f"the rendered conversation has {placeholder.sum()} images and videos, the messages "
                f"{len(record.media)}, or their order is another",
            )
        if not trained.any() or (record.is_document and not "".join(texts).strip()):
            raise RecordError(Reason.NOTHING_TO_TRAIN, "no token of the conversation is trained")
        return EncodedConversation(token_ids, trained.astype(np.uint8))

    def _render_record(self, record: Record, write: Callable[[str], str]) -> Rendered:
        """The text of a record, media as marks, and its generated spans; `write` says how a text is written."""
        contents = [
            "".join(write("".join(run)) if is_text else "".join(map(_mark, run)) for is_text, run in _runs(message))
            for message in record.messages
        ]
        if not record.is_document:
            messages = zip(record.messages, contents, strict=True)
            return self.render([{"role": message.role, "content": content} for message, content in messages])
        hf = self.tokenizer.hf
        text = f"{hf.bos_token or ''}{''.join(contents)}{hf.eos_token or ''}"
        return text, [(0, len(text))]


def _runs(message: Message) -> Iterator[tuple[bool, Iterator[Any]]]:
    """The parts of a message, those of text that touch together: a mark may be written across two of them."""
    return groupby(message.parts, key=lambda part: isinstance(part, str))


def _mark(medium: Image | Video) -> str:
    return IMAGE_MARK if isinstance(medium, Image) else VIDEO_MARK
