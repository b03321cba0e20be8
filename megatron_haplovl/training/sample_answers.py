"""Fixed questions, answered by the model in training, so that one can read what it learns."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from megatron_haplovl.config.schema import Config
from megatron_haplovl.conversion.export import embedding_rows, generation_config, training_template
from megatron_haplovl.data.chat_template import ConversationEncoder, load_chat_template
from megatron_haplovl.data.tokenizer import load_tokenizer
from megatron_haplovl.engine.asking import ask
from megatron_haplovl.evaluation.answers_file import AnswersFile, SampleAnswer
from megatron_haplovl.evaluation.prompts import GrowingAnswer, Prompt, build_prompt
from megatron_haplovl.evaluation.questions import load_questions
from megatron_haplovl.operation.phase import EnterPhase
from megatron_haplovl.parallel.collectives import all_gather
from megatron_haplovl.parallel.groups import ParallelGroups
from megatron_haplovl.parallel.sharded_model import ShardedModel
from megatron_haplovl.training.sinks.sinks import Sinks

logger = logging.getLogger(__name__)

# Sequences are padded to a multiple of this, so that not every length is a shape of its own.
_LENGTHS = 64
_SHOWN = 160
"""Characters of a question or an answer in the log."""


@dataclass(frozen=True)
class SampleQuestions:
    """The questions of a run, ready to be asked again and again. Made by :func:`open_sample_questions`."""

    prompts: tuple[Prompt, ...]
    encoder: ConversationEncoder
    ends: tuple[int, ...]
    """Tokens that end an answer."""
    never: tuple[int, ...]
    """Tokens that no answer has."""
    file: AnswersFile | None
    """On rank 0, with --save."""
    sinks: Sinks

    def answer(
        self, step: int, engine: Any, model: ShardedModel, device: torch.device, enter_phase: EnterPhase
    ) -> list[SampleAnswer]:
        """Answer all questions with the model as it is, and report the answers. Called by every rank.

        Data-parallel ranks share the questions out and go through them in step, a token at a time, because ZeRO-3's
        ranks need each other in every forward pass.

        Args:
            step: optimizer steps done.
            engine: the DeepSpeed engine.
            model: this rank's part of the model.
            device: where it is.
            enter_phase: is told of every token, so that a rank that is slow does not look stuck.

        Returns:
            The answers in the order of the questions, on every rank.
        """
        data = model.groups.data
        tokens: list[list[int]] = []
        for first in range(0, len(self.prompts), data.size):
            # A rank without a question of its own asks the last one once more.
            asked = [min(first + rank, len(self.prompts) - 1) for rank in range(data.size)]
            answers = [GrowingAnswer(self.prompts[number], self.ends, device) for number in asked]
            while not all(answer.is_complete for answer in answers):
                enter_phase("evaluate")
                chosen = self._next_token(answers[data.rank], engine, model)
                for answer, token in zip(answers, _tell_all(chosen, model.groups), strict=True):
                    if not answer.is_complete:
                        answer.append(token)
            tokens += [answer.tokens for answer in answers]
        found = [self._sample(step, prompt, ids) for prompt, ids in zip(self.prompts, tokens, strict=False)]
        self._report(step, found)
        return found

    def _next_token(self, answer: GrowingAnswer, engine: Any, model: ShardedModel) -> int | None:
        """The likeliest next token; None on ranks that do not hold the last position's hidden state."""
        logits_MV = ask(engine, model, answer.batch, _logits)
        if logits_MV is None or len(logits_MV) == 0:
            return None
        if model.groups.tensor.size > 1:
            logits_MV = all_gather(logits_MV, model.groups.tensor, 1)
        logits_V = logits_MV[0]
        logits_V[list(self.never)] = -torch.inf
        return int(logits_V.argmax())

    def _sample(self, step: int, prompt: Prompt, ids: list[int]) -> SampleAnswer:
        question = prompt.question
        return SampleAnswer(
            step=step,
            question_id=question.question_id,
            question=question.text,
            images=tuple(map(str, question.images)),
            answer=str(self.encoder.tokenizer.hf.decode(ids, skip_special_tokens=True)).strip(),
            token_ids=tuple(ids),
            has_ended=ids[-1] in self.ends,
            reference=question.answer or None,
        )

    def _report(self, step: int, answers: list[SampleAnswer]) -> None:
        for answer in answers:
            reference = "" if answer.reference is None else f" (reference: {_short(answer.reference)})"
            logger.info(
                f"answer after step {step}, question {answer.question_id}: {_short(answer.question)} -> "
                f"{_short(answer.answer)}{'' if answer.has_ended else ' ...'}{reference}"
            )
        self.sinks.record_texts(step, {f"answer/{answer.question_id}": answer.answer for answer in answers})
        if self.file is not None:
            self.file.append(answers)


def open_sample_questions(
    config: Config, groups: ParallelGroups, sinks: Sinks, first_step: int
) -> SampleQuestions | None:
    """Read the questions of a run. Called by every rank; each reads the files.

    Args:
        config: the run's settings.
        groups: its process groups.
        sinks: where answers are reported.
        first_step: steps that the run goes on from.

    Returns:
        None without --sample-questions.

    Raises:
        ValueError: tokenizer, chat template, a question or an image cannot be used, or a question is too long.
    """
    if config.logging.sample_questions is None:
        return None
    encoder, prompts = groups.world.together(lambda: _read(config))
    generation = generation_config(encoder, model=config.model, rows=embedding_rows(config.model, encoder.tokenizer))
    file = None
    if groups.world.rank == 0 and config.checkpoint.save is not None:
        file = AnswersFile(Path(config.checkpoint.save), first_step)
    never = tuple(token for token in generation.suppress_tokens if token < config.model.vocab_size)
    return SampleQuestions(prompts, encoder, tuple(generation.eos_token_id), never, file, sinks)


def _read(config: Config) -> tuple[ConversationEncoder, tuple[Prompt, ...]]:
    logging, data = config.logging, config.data
    assert logging.sample_questions is not None and data.tokenizer_model is not None
    tokenizer = load_tokenizer(data.tokenizer_model)
    if logging.sample_chat_template is None:
        template = training_template(config, tokenizer, "--sample-chat-template")
    else:
        template = load_chat_template(logging.sample_chat_template)
    encoder = ConversationEncoder(tokenizer, template)
    questions = load_questions(
        logging.sample_questions,
        logging.sample_image_folder,
        needs_answers=False,
        folder_flag="--sample-image-folder",
    )
    prompts = tuple(
        build_prompt(
            question,
            encoder,
            config.model,
            max_new_tokens=logging.sample_max_new_tokens,
            seq_length=data.seq_length,
            multiple_of=_length_unit(config),
        )
        for question in questions
    )
    return encoder, prompts


def _length_unit(config: Config) -> int:
    """What the length of every question is a multiple of."""
    parallel = config.parallel
    if config.precision.compile:
        # Compiled blocks are made for the lengths of the training.
        return config.data.seq_length
    return _LENGTHS * parallel.context_parallel_size * parallel.tensor_model_parallel_size


def _logits(
    hidden_ML: torch.Tensor, weight_VL: torch.Tensor, _labels_M: torch.Tensor, _sources: object
) -> torch.Tensor:
    """This rank's words of the logits, in fp32."""
    return F.linear(hidden_ML, weight_VL).float()


def _tell_all(chosen: int | None, groups: ParallelGroups) -> list[int]:
    """The next token of every data-parallel rank's question, on every rank."""
    tokens = torch.zeros(groups.data.size, dtype=torch.int64)
    if chosen is not None and groups.tensor.rank == 0:
        tokens[groups.data.rank] = chosen
    return groups.control.sum(tokens).tolist()


def _short(text: str) -> str:
    """A text on one line, cut off where it is long."""
    line = " ".join(text.split())
    return repr(line if len(line) <= _SHOWN else line[:_SHOWN] + " ...")
