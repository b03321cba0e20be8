"""Questions answered by the model in training, in every layout, against `generate` of the exported model."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from megatron_haplovl.conversion.export import export_checkpoint
from megatron_haplovl.data.chat_template import load_chat_template
from megatron_haplovl.data.tokenizer import load_tokenizer
from megatron_haplovl.evaluation.answering import load_answerer
from megatron_haplovl.evaluation.questions import load_questions
from megatron_haplovl.hf.modeling_haplo import TEXT
from tests.distributed.cases import PARALLEL_RANKS
from tests.distributed.launch import run_ranks
from tests.distributed.samples import CASES, NEW_TOKENS, folder_of, make_questions

# In bf16, two words that are nearly as likely change places when the same sums are added up in another order. Measured
# worst case: 0.026. The same answers read backwards have more than 0.9.
BF16_GAP = 0.05


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    make_questions(folder)
    return folder


def found(folder, case):
    """What the case, which runs when it is first asked for, has left behind."""
    path = folder_of(case, folder) / "found.json"
    if not path.is_file():
        run_ranks("worker_samples.py", PARALLEL_RANKS, str(folder), case)
    return json.loads(path.read_text())


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
        assert 1 <= len(answer["token_ids"]) <= NEW_TOKENS
        if "bf16" in case:
            assert largest_gap(answerer, question, answer["token_ids"]) < BF16_GAP
        else:
            expected = answerer.answer([question.text], [question.images], max_new_tokens=NEW_TOKENS)[0]
            assert answer["answer"] == expected, question.question_id
    assert len({answer["answer"] for answer in answers}) > 2


@torch.inference_mode()
def largest_gap(answerer, question, token_ids):
    """By how much the exported model's likeliest token is better than the given one, at most, behind the same tokens.

    A share of the largest logit.
    """
    text = answerer.processor.apply_chat_template(
        [{"role": "user", "content": question.text}], add_generation_prompt=True
    )
    images = [[Image.open(path).convert("RGB") for path in question.images]]
    inputs = dict(answerer.processor(text=[text], images=images))
    length, answer = inputs["input_ids"].shape[1], torch.tensor([token_ids])
    behind = {
        "input_ids": answer,
        "attention_mask": torch.ones_like(answer),
        "visual_source": torch.full_like(answer, TEXT),
        "attention_start_ids": torch.arange(length, length + len(token_ids)).unsqueeze(0),
    }
    inputs |= {name: torch.cat([inputs[name], more], dim=1) for name, more in behind.items() if name in inputs}
    logits_NV = answerer.model(**inputs).logits[0, length - 1 : -1].float()
    logits_NV[:, answerer.model.generation_config.suppress_tokens] = -torch.inf
    best_N = logits_NV.max(dim=1).values
    return float(((best_N - logits_NV.gather(1, answer.T).squeeze(1)) / best_N).max())


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_as_if_nobody_had_asked(folder, case):
    for rank in found(folder, case):
        assert rank["asked"] == rank["not asked"]
        assert rank["answers"] == found(folder, case)[0]["answers"]
