"""A template that would not train the end of an answer is refused, and those that do are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_haplovl.data.chat_template import TEMPLATE_NAMES, ConversationEncoder, load_chat_template
from megatron_haplovl.data.tokenizer import TextTokenizer, load_tokenizer
from tests.conftest import byte_level_folder, train_sentencepiece


@pytest.fixture(scope="module", params=["sentencepiece", "byte level", "byte level, offsets not trimmed"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "sentencepiece":
        return load_tokenizer(train_sentencepiece(folder))
    return load_tokenizer(byte_level_folder(folder, trim_offsets=request.param == "byte level"))


def encoder(tokenizer: TextTokenizer, folder: Path, answer: str) -> ConversationEncoder:
    """With a template that writes the assistant's turns as `answer` says."""
    path = folder / "own.jinja"
    path.write_text(
        "{% for m in messages %}\n{% if m.role == 'assistant' %}\nASSISTANT: "
        + answer
        + "{% else %}USER: {{ m.content }}\n{% endif %}{% endfor %}"
    )
    return ConversationEncoder(tokenizer, load_chat_template(str(path)))


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_templates_of_the_package(tokenizer: TextTokenizer, name: str) -> None:
    ConversationEncoder(tokenizer, load_chat_template(name))


@pytest.mark.parametrize(
    "answer",
    [
        "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}",
        "{% generation %}{{ m.content | trim }} \n{{ eos_token }}{% endgeneration %}\n",
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n",
        "{%- generation -%}{{- m.content | upper ~ '<|eot_id|>' -}}{%- endgeneration -%}{{ eos_token }}",
        "{% generation %}{{ m.content }} END{% endgeneration %}",
    ],
)
def test_end_that_is_trained(tokenizer: TextTokenizer, tmp_path: Path, answer: str) -> None:
    encoder(tokenizer, tmp_path, answer)


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        ("{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}", "'</s>' behind an answer"),
        ("{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n", "'<|im_end|>' behind an answer"),
        ("{% generation %}{{ m.content }}\n{% endgeneration %}<|eot_id|>", "'<|eot_id|>' behind an answer"),
        ("{% generation %}{{ m.content }}{% endgeneration %}", "anything behind an answer"),
        ("{% generation %}{{ m.content }}{% endgeneration %} END", "anything behind an answer"),
    ],
)
def test_end_that_is_not_trained(tokenizer: TextTokenizer, tmp_path: Path, answer: str, what: str) -> None:
    with pytest.raises(ValueError) as caught:
        encoder(tokenizer, tmp_path, answer)
    message = str(caught.value)
    assert f"does not train {what}, so a model trained with it would never stop" in message
    assert "line 3: ASSISTANT: {% generation %}" in message and "line 1" not in message


def test_plain_without_an_end_of_sequence_token_trains_its_line_break(tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path, eos_id=-1, normalization_rule_name="identity", remove_extra_whitespaces=False)
    ConversationEncoder(load_tokenizer(model), load_chat_template("plain"))


def test_template_without_the_answers(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not write the answers"):
        encoder(tokenizer, tmp_path, "{% generation %}yes{{ eos_token }}{% endgeneration %}")
