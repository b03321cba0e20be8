"""Questions answered by the model in training, in every layout, against `generate` of the exported model.

Planted once to see it fail: the hidden state of the position before (all), only the first tensor-parallel rank's words
(TP), no evaluation of the marks that are never answers.
"""

from __future__ import annotations

import json

import pytest
import torch

from megatron_haplovl.conversion.export import export_checkpoint
from megatron_haplovl.data.chat_template import load_chat_template
from megatron_haplovl.data.tokenizer import load_tokenizer
from megatron_haplovl.evaluation.answering import load_answerer
from megatron_haplovl.evaluation.questions import load_questions
from tests.distributed.cases import PARALLEL_RANKS
from tests.distributed.launch import run_ranks
from tests.distributed.samples import CASES, NEW_TOKENS, folder_of, make_questions

# Of the largest logit; in bf16 another order of the same sums decides between two words that are as likely.
BF16_MARGIN = 0.05


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One launch of all cases."""
    folder = tmp_path_factory.mktemp("samples")
    make_questions(folder)
    run_ranks("worker_samples.py", PARALLEL_RANKS, str(folder), *CASES)
    return folder


def found(folder, case):
    return json.loads((folder_of(case, folder) / "found.json").read_text())


def exported(folder, case):
    """The answerer of what the case has exported."""
    left = folder_of(case, folder)
    dtype = torch.bfloat16 if "bf16" in case else None
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    export_checkpoint(left, left / "haplo", tokenizer, load_chat_template("vicuna_v1"), dtype=dtype)
    return load_answerer(left / "haplo", "cpu")


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_the_exported_model(folder, case):
    answers = found(folder, case)[0]["answers"]
    answerer = exported(folder, case)
    questions = load_questions(folder / "questions.jsonl", folder, needs_answers=False)
    assert [answer["question_id"] for answer in answers] == [question.question_id for question in questions]
    for question, answer in zip(questions, answers, strict=True):
        assert answer["reference"] == (question.answer or None)
        assert 1 <= answer["tokens"] <= NEW_TOKENS
        expected = answerer.answer([question.text], [question.images], max_new_tokens=NEW_TOKENS)[0]
        if "bf16" not in case:
            assert answer["answer"] == expected, question.question_id
    assert len({answer["answer"] for answer in answers}) > 2


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_as_if_nobody_had_asked(folder, case):
    for rank in found(folder, case):
        assert rank["asked"] == rank["not asked"]
        assert rank["answers"] == found(folder, case)[0]["answers"]
