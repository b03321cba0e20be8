"""Chat templates: from messages to token ids and the mask of tokens that are trained.

A template is Jinja in the form of Hugging Face's chat templates. What lies between `{% generation %}` and
`{% endgeneration %}` is what the model learns to write; the loss mask comes from these marks alone, never from a search
for strings in the text.

Shape letters: N tokens of a conversation.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_haplovl.data.records import Image, Message, Reason, Record, RecordError, Video
from megatron_haplovl.data.tokenizer import IMAGE_MARK, VIDEO_MARK, TextTokenizer

_FOLDER = Path(__file__).parent / "templates"
TEMPLATE_NAMES = ("plain", "vicuna_v1", "llama3", "chatml")
"""Templates that come with the package."""

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
        ValueError: the template writes control tokens that the tokenizer does not know, or cannot be rendered with it.
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
            self.encode(Record((Message("user", ("a",)), Message("assistant", ("b",)))))
        except RecordError as error:
            raise ValueError(f"chat template {self.template.name!r} does not fit the tokenizer: {error}") from error

    @cached_property
    def _reserved(self) -> tuple[str, ...]:
        """Control tokens that a record must not write: those of the template, and the tokenizer's bos, eos and pad."""
        hf = self.tokenizer.hf
        tokens = {hf.bos_token, hf.eos_token, hf.pad_token} | self.template.control_marks
        return tuple(sorted(token for token in tokens if token))

    def render(
        self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation and the character spans `[start, end)` that are generated.

        Raises:
            RecordError: the template refuses the messages.
        """
        hf = self.tokenizer.hf
        try:
            # It is declared to return a string, and returns (texts, spans).
            rendered: Any = render_jinja_template(
                [messages],
                chat_template=self.template.source,
                return_assistant_tokens_mask=True,
                add_generation_prompt=add_generation_prompt,
                bos_token=hf.bos_token,
                eos_token=hf.eos_token,
            )
        except TemplateError as error:
            raise RecordError(Reason.TEMPLATE, str(error)) from error
        texts, spans = rendered
        return texts[0], [(int(start), int(end)) for start, end in spans[0]]

    def encode(self, record: Record) -> EncodedConversation:
        """Tokenize a record and mark what is trained.

        Raises:
            RecordError: a control token is written out in a text, the template drops an image or a video, or no token
                is trained.
        """
        for text in (part for message in record.messages for part in message.parts if isinstance(part, str)):
            for token in self._reserved:
                if token in text:
                    raise RecordError(Reason.RESERVED_TOKEN, f"the text contains the control token {token!r}")
        text, spans = self.render([{"role": message.role, "content": _content(message)} for message in record.messages])
        ids, offsets = self.tokenizer.encode(text)
        token_ids = np.array(ids, dtype=np.int32)
        offsets_N2 = np.array(offsets, dtype=np.int64).reshape(-1, 2)

        # A token is trained if it shares a character with a generated span.
        trained = np.zeros(len(ids), dtype=bool)
        for start, end in spans:
            trained |= (offsets_N2[:, 0] < end) & (offsets_N2[:, 1] > start)
        placeholder = np.isin(token_ids, self.tokenizer.placeholder_ids)
        trained &= ~placeholder
        trained[:1] = False

        expected = len(record.media)
        if int(placeholder.sum()) != expected:
            raise RecordError(
                Reason.TEMPLATE,
                f"the rendered conversation has {placeholder.sum()} images and videos, the messages {expected}",
            )
        if not trained.any():
            raise RecordError(Reason.NOTHING_TO_TRAIN, "no token of the conversation is trained")
        return EncodedConversation(token_ids, trained.astype(np.uint8))


_MARKS = {Image: IMAGE_MARK, Video: VIDEO_MARK}


def _content(message: Message) -> str:
    """A message as a template gets it: media as marks."""
    return "".join(part if isinstance(part, str) else _MARKS[type(part)] for part in message.parts)
