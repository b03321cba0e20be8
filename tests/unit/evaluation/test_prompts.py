"""Questions with room for their answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_haplovl.data.batch import IGNORE_INDEX
from megatron_haplovl.data.chat_template import ConversationEncoder, load_chat_template
from megatron_haplovl.data.tokenizer import load_tokenizer
from megatron_haplovl.evaluation.prompts import GrowingAnswer, Prompt, build_prompt
from megatron_haplovl.evaluation.questions import Question
from tests.fixtures.tiny_haplo import noise_image, random_haplovl, tiny_model, train_tokenizer

SETTINGS = {"max_new_tokens": 4, "seq_length": 400, "multiple_of": 10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    train_tokenizer(folder)
    noise_image(8, 8).save(folder / "one.png")
    (folder / "text.png").write_text("no picture")
    return folder


def prompt_of(folder: Path, text: str, *images: str, **changes: int) -> Prompt:
    encoder = ConversationEncoder(load_tokenizer(folder / "tokenizer.model"), load_chat_template("vicuna_v1"))
    question = Question("7", text, tuple(folder / name for name in images), "", "all")
    return build_prompt(question, encoder, tiny_model(), **{**SETTINGS, **changes})


def test_an_answer_grows_in_place(folder: Path) -> None:
    prompt = prompt_of(folder, "<image> what color", "one.png")
    assert prompt.batch.tokens_BS.shape[1] % 10 == 0
    answer = GrowingAnswer(prompt, [2], torch.device("cpu"))
    for token in (5, 6, 2):
        assert not answer.is_complete
        position = prompt.length + len(answer.tokens) - 1
        assert (answer.batch.labels_BS[0] != IGNORE_INDEX).nonzero().flatten().tolist() == [position]
        answer.append(token)
        assert answer.batch.tokens_BS[0, position + 1] == token
    assert answer.has_ended and answer.is_complete and answer.tokens == [5, 6, 2]
    again = GrowingAnswer(prompt, [2], torch.device("cpu"))
    assert int(again.batch.tokens_BS[0, prompt.length :].abs().sum()) == 0


def test_what_is_behind_changes_nothing(folder: Path) -> None:
    prompt = prompt_of(folder, "<image> what color", "one.png")
    model = random_haplovl(tiny_model())
    with torch.no_grad():
        before = model.logits(prompt.batch)[0, : prompt.length]
        prompt.batch.tokens_BS[0, prompt.length :] = 9
        assert torch.equal(model.logits(prompt.batch)[0, : prompt.length], before)


def test_an_answer_may_be_as_long_as_it_is_allowed(folder: Path) -> None:
    answer = GrowingAnswer(prompt_of(folder, "what"), [2], torch.device("cpu"))
    for _ in range(4):
        answer.append(9)
    assert answer.is_complete and not answer.has_ended


def test_refused(folder: Path) -> None:
    whole = prompt_of(folder, "what").length + 4
    assert prompt_of(folder, "what", seq_length=whole)
    with pytest.raises(ValueError, match=f"question 7 has {whole - 4} tokens .* --seq-length is {whole - 1}"):
        prompt_of(folder, "what", seq_length=whole - 1)
    with pytest.raises(ValueError, match=r"text\.png: "):
        prompt_of(folder, "<image> what", "text.png")
