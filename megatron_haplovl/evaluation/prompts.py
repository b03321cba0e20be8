"""Questions as micro-batches that grow by one answer token after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_haplovl.config.schema import ModelConfig
from megatron_haplovl.data.batch import IGNORE_INDEX, Batch
from megatron_haplovl.data.chat_template import ConversationEncoder
from megatron_haplovl.data.dataset import collate, lay_out_document
from megatron_haplovl.data.image_processing import decode_image
from megatron_haplovl.data.sources import EncodedImage, Sample
from megatron_haplovl.evaluation.questions import Question


@dataclass(frozen=True)
class Prompt:
    """A question with room for its answer. Made by :func:`build_prompt`."""

    question: Question
    batch: Batch
    """One sequence: the rendered question, then as many text tokens as the answer may have. What stands behind a text
    token never changes what the model makes of it, so the answer can be written in place."""
    length: int
    """Tokens of the question, visual ones included."""
    max_new_tokens: int


def build_prompt(
    question: Question,
    encoder: ConversationEncoder,
    model: ModelConfig,
    *,
    max_new_tokens: int,
    seq_length: int,
    multiple_of: int,
) -> Prompt:
    """Lay a question out as training does.

    Args:
        question: the question; its images are read here.
        encoder: tokenizer and chat template.
        model: the model that is asked.
        max_new_tokens: room for the answer.
        seq_length: longest sequence that the model is trained on.
        multiple_of: the sequence's length is a multiple of this, so that ranks can share it.

    Raises:
        ValueError: an image that cannot be decoded, or question and answer are longer than a sequence.
    """
    tokenizer = encoder.tokenizer
    text, _ = encoder.render([{"role": "user", "content": question.text}], add_generation_prompt=True)
    ids = [*tokenizer.encode(text)[0], *[0] * max_new_tokens]
    token_ids = np.array(ids, dtype=np.int32)
    is_visual = np.isin(token_ids, tokenizer.placeholder_ids)
    is_visual[-max_new_tokens:] = False
    images = tuple(_read_image(path) for path in question.images)
    sample = Sample(token_ids, np.zeros(len(ids), np.uint8), is_visual, images)
    document = lay_out_document([sample], model.vision)
    total = len(document.tokens)
    if total > seq_length:
        raise ValueError(
            f"question {question.question_id} has {total - max_new_tokens} tokens and its answer up to "
            f"{max_new_tokens}, --seq-length is {seq_length}; shorten it, or lower --sample-max-new-tokens"
        )
    padded = -(-total // multiple_of) * multiple_of
    batch = collate([[document]], padded, model.vision, model.image_attention)
    return Prompt(question, batch, total - max_new_tokens, max_new_tokens)


def _read_image(path: Path) -> EncodedImage:
    data = path.read_bytes()
    try:
        image = decode_image(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return EncodedImage(data, image.height, image.width)


class GrowingAnswer:
    """An answer in the making.

    Args:
        prompt: the question.
        ends: tokens that end an answer.
        device: where the model is.
    """

    def __init__(self, prompt: Prompt, ends: Sequence[int], device: torch.device) -> None:
        batch = prompt.batch.to(device)
        # Copies, because the answer is written into the tokens.
        self.batch = dataclasses.replace(batch, tokens_BS=batch.tokens_BS.clone(), labels_BS=batch.labels_BS.clone())
        self.tokens: list[int] = []
        """Tokens so far, an end token included."""
        self._prompt, self._ends = prompt, frozenset(ends)
        self._look_at(prompt.length - 1)

    @property
    def has_ended(self) -> bool:
        """Whether an end token is there."""
        return bool(self.tokens) and self.tokens[-1] in self._ends

    @property
    def is_complete(self) -> bool:
        """Whether it has ended or is as long as it may be."""
        return self.has_ended or len(self.tokens) == self._prompt.max_new_tokens

    def append(self, token: int) -> None:
        """Write the next token; the batch then asks for the one behind it."""
        position = self._prompt.length + len(self.tokens)
        self.tokens.append(token)
        self.batch.tokens_BS[0, position] = token
        self._look_at(position)

    def _look_at(self, position: int) -> None:
        """A label at one position alone: the head computes nothing else."""
        self.batch.labels_BS.fill_(IGNORE_INDEX)
        self.batch.labels_BS[0, position] = 0
