"""Each template against strings written out by hand, and the loss mask against the text that must be trained."""

from __future__ import annotations

import resource
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_haplovl.data import chat_template
from megatron_haplovl.data.chat_template import TEMPLATE_NAMES, ConversationEncoder, load_chat_template
from megatron_haplovl.data.records import Image, Message, Part, Reason, Record, RecordError, Video
from megatron_haplovl.data.tokenizer import load_tokenizer
from tests.chat import chat
from tests.conftest import byte_level_folder, train_sentencepiece

MESSAGES = [
    {"role": "user", "content": "<image>\nWhat color is it? "},
    {"role": "assistant", "content": "It is red."},
    {"role": "user", "content": "And the circle?"},
    {"role": "assistant", "content": " The circle is blue.\n"},
]
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# Template -> whole text, and the parts of it that are trained.
EXPECTED = {
    "plain": (
        "<s><image>It is red.</s>The circle is blue.</s>",
        ["It is red.</s>", "The circle is blue.</s>"],
    ),
    "vicuna_v1": (
        f"<s>{VICUNA_SYSTEM} USER: <image>\nWhat color is it? ASSISTANT: It is red.</s>"
        "USER: And the circle? ASSISTANT: The circle is blue.</s>",
        ["It is red.</s>", "The circle is blue.</s>"],
    ),
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat color is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nIt is red.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd the circle?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nThe circle is blue.<|eot_id|>",
        ["It is red.<|eot_id|>", "The circle is blue.<|eot_id|>"],
    ),
    "chatml": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat color is it?<|im_end|>\n"
        "<|im_start|>assistant\nIt is red.<|im_end|>\n"
        "<|im_start|>user\nAnd the circle?<|im_end|>\n"
        "<|im_start|>assistant\nThe circle is blue.<|im_end|>\n",
        ["It is red.<|im_end|>", "The circle is blue.<|im_end|>"],
    ),
}


@pytest.fixture(scope="module")
def model_with_newlines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer model without normalization, like Llama's, so that line breaks survive (as bytes)."""
    return train_sentencepiece(
        tmp_path_factory.mktemp("spm"), normalization_rule_name="identity", remove_extra_whitespaces=False
    )


def _document(*parts: Part) -> Record:
    return Record((Message("user", parts),), is_document=True)


def make_encoder(model: Path, name: str) -> ConversationEncoder:
    return ConversationEncoder(load_tokenizer(model), load_chat_template(name))


def trained_texts(encoder: ConversationEncoder, messages: list[dict[str, str]]) -> list[str]:
    """The text of each run of trained tokens."""
    encoded = encoder.encode(chat(messages))
    runs = np.split(np.arange(len(encoded.loss_mask)), np.flatnonzero(np.diff(encoded.loss_mask)) + 1)
    trained = (encoded.token_ids[run].tolist() for run in runs if encoded.loss_mask[run[0]])
    return [str(encoder.tokenizer.hf.decode(ids)) for ids in trained]


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_rendered_text(tiny_spm_model: Path, name: str) -> None:
    text, spans = make_encoder(tiny_spm_model, name).render(MESSAGES)
    expected, trained = EXPECTED[name]
    assert text == expected
    # Vicuna's span begins with the space that belongs to the first word of the answer.
    assert [text[start:end].strip() for start, end in spans if text[start:end].strip()][0].startswith("It is red.")
    assert "".join(text[start:end].strip() for start, end in spans) == "".join(trained)


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_trained_tokens_are_the_answers(model_with_newlines: Path, name: str) -> None:
    encoder = make_encoder(model_with_newlines, name)
    expected = EXPECTED[name][1]
    if name == "plain":  # the two answers touch
        expected = ["".join(expected)]
    got = trained_texts(encoder, MESSAGES)
    assert [text.replace("</s> ", "</s>").strip() for text in got] == expected


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_trained_tokens_are_what_follows_the_generation_prompt(model_with_newlines: Path, name: str) -> None:
    """What the model is asked to continue is exactly what it was trained to continue."""
    encoder = make_encoder(model_with_newlines, name)
    whole = encoder.encode(chat(MESSAGES[:2]))
    prompt, _ = encoder.render(MESSAGES[:1], add_generation_prompt=True)
    prompt_ids, _ = encoder.tokenizer.encode(prompt)
    assert whole.token_ids[: len(prompt_ids)].tolist() == prompt_ids
    assert int(np.argmax(whole.loss_mask)) == len(prompt_ids)


@pytest.mark.parametrize("trim_offsets", [True, False])
@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_byte_level_tokenizer_from_a_hugging_face_folder(tmp_path: Path, name: str, trim_offsets: bool) -> None:
    """As in Llama 3 and Qwen, spaces belong to the words behind them, and offsets may or may not cover them."""
    encoder = make_encoder(byte_level_folder(tmp_path, trim_offsets=trim_offsets), name)
    text, trained = EXPECTED[name]
    encoded = encoder.encode(chat(MESSAGES))
    assert encoder.tokenizer.hf.decode(encoded.token_ids.tolist(), clean_up_tokenization_spaces=False) == text
    expected = ["".join(trained)] if name == "plain" else trained
    assert [run.strip() for run in trained_texts(encoder, MESSAGES)] == expected


@pytest.mark.parametrize("name", ["vicuna_v1", "llama3", "chatml"])
def test_system_message(tiny_spm_model: Path, name: str) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *MESSAGES[:2]]
    text, _ = make_encoder(tiny_spm_model, name).render(messages)
    assert text.count("Be brief.") == 1
    assert VICUNA_SYSTEM not in text and "helpful assistant" not in text


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_content_in_parts_as_processors_give_it(tiny_spm_model: Path, name: str) -> None:
    encoder = make_encoder(tiny_spm_model, name)
    question = [{"type": "image"}, {"type": "text", "text": "What color is it?"}]
    parts = [{"role": "user", "content": question}, {"role": "assistant", "content": [{"type": "text", "text": "red"}]}]
    plain = [
        {"role": "user", "content": "<image>\nWhat color is it?"},
        {"role": "assistant", "content": "red"},
    ]
    assert encoder.render(parts) == encoder.render(plain)  # type: ignore[arg-type]


def test_image_in_an_answer_is_not_trained(tiny_spm_model: Path) -> None:
    encoder = make_encoder(tiny_spm_model, "chatml")
    messages = [{"role": "user", "content": "Show."}, {"role": "assistant", "content": "This: <image> it is."}]
    encoded = encoder.encode(chat(messages))
    image = encoded.token_ids == encoder.tokenizer.image_token_id
    assert image.sum() == 1 and encoded.loss_mask[image].tolist() == [0]


def test_first_token_is_never_trained(tmp_path: Path) -> None:
    template = tmp_path / "bare.jinja"
    template.write_text("{% generation %}{{ messages[1].content }}{{ eos_token }}{% endgeneration %}")
    encoder = make_encoder(train_sentencepiece(tmp_path), str(template))
    encoded = encoder.encode(chat([{"role": "user", "content": ""}, {"role": "assistant", "content": "It is red."}]))
    assert encoded.loss_mask[0] == 0 and encoded.loss_mask[1:].all()


def test_control_token_in_the_text(tiny_spm_model: Path) -> None:
    encoder = make_encoder(tiny_spm_model, "chatml")
    for token in ("<|im_end|>", "</s>"):
        with pytest.raises(RecordError) as caught:
            encoder.encode(chat([{"role": "user", "content": f"a {token} b"}, {"role": "assistant", "content": "b"}]))
        assert caught.value.reason is Reason.RESERVED_TOKEN
        assert token in caught.value.detail


def test_template_and_tokenizer_that_do_not_fit(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(train_sentencepiece(tmp_path, control_symbols=[]))
    with pytest.raises(ValueError, match=r"'chatml' writes '<\|im_end\|>', which the tokenizer does not know"):
        ConversationEncoder(tokenizer, load_chat_template("chatml"))
    no_eos = load_tokenizer(train_sentencepiece(tmp_path, name="no_eos", eos_id=-1))
    with pytest.raises(ValueError, match="vicuna_v1 ends every answer with an end-of-sequence token"):
        ConversationEncoder(no_eos, load_chat_template("vicuna_v1"))


def test_template_without_generation_marks(tmp_path: Path) -> None:
    (tmp_path / "x.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(ValueError, match=r"has no {% generation %} block"):
        load_chat_template(str(tmp_path / "x.jinja"))
    with pytest.raises(ValueError, match="'vicuna' is neither one of"):
        load_chat_template("vicuna")


def test_template_that_drops_an_image(tmp_path: Path, tiny_spm_model: Path) -> None:
    (tmp_path / "x.jinja").write_text("Q: {% generation %}{{ messages[-1].content }}{{ eos_token }}{% endgeneration %}")
    encoder = make_encoder(tiny_spm_model, str(tmp_path / "x.jinja"))
    with pytest.raises(RecordError, match="has 0 images and videos, the messages 1"):
        encoder.encode(chat(MESSAGES[:2]))


@pytest.mark.parametrize("has_ends", [True, False])
def test_document(tmp_path: Path, has_ends: bool) -> None:
    """Bos, text and media as they stand, eos; all text is trained but the first token."""
    options: dict[str, Any] = {} if has_ends else {"bos_id": -1, "eos_id": -1}
    model = train_sentencepiece(tmp_path, normalization_rule_name="identity", **options)
    tokenizer = load_tokenizer(model)
    parts: tuple[Part, ...] = ("The circle", Image(path="a.png"), Video(path="b.mp4"), " is red.\n")
    template = "plain" if has_ends else "chatml"
    encoded = ConversationEncoder(tokenizer, load_chat_template(template)).encode(_document(*parts))
    text = "The circle<image><video> is red.\n"
    expected, _ = tokenizer.encode(f"<s>{text}</s>" if has_ends else text)
    assert encoded.token_ids.tolist() == expected
    untrained = [0, *np.flatnonzero(np.isin(expected, tokenizer.placeholder_ids)).tolist()]
    assert len(untrained) == 3 and np.flatnonzero(encoded.loss_mask == 0).tolist() == untrained


def test_document_without_text(tiny_spm_model: Path) -> None:
    with pytest.raises(RecordError) as caught:
        make_encoder(tiny_spm_model, "plain").encode(_document(Image(path="a.png"), " "))
    assert caught.value.reason is Reason.NOTHING_TO_TRAIN


def test_control_token_across_two_parts_of_text(tiny_spm_model: Path) -> None:
    with pytest.raises(RecordError) as caught:
        make_encoder(tiny_spm_model, "plain").encode(_document("a <", "/s> b"))
    assert caught.value.reason is Reason.RESERVED_TOKEN


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_videos_and_images_stay_in_order(tiny_spm_model: Path, name: str) -> None:
    encoder = make_encoder(tiny_spm_model, name)
    question = {"role": "user", "content": "<video>\n<image>\n<video>What?"}
    encoded = encoder.encode(chat([question, {"role": "assistant", "content": "red"}]))
    image, video = encoder.tokenizer.placeholder_ids
    assert [i for i in encoded.token_ids.tolist() if i in (image, video)] == [video, image, video]


def test_template_that_moves_a_video(tmp_path: Path, tiny_spm_model: Path) -> None:
    count = "<image>{% if '<video>' in messages[0].content %}<video>{% endif %}"
    answer = "{% generation %}{{ messages[1].content }}{{ eos_token }}{% endgeneration %}"
    (tmp_path / "x.jinja").write_text(f"{{% if '<image>' in messages[0].content %}}{count}{{% endif %}}{answer}")
    encoder = make_encoder(tiny_spm_model, str(tmp_path / "x.jinja"))
    answered = {"role": "assistant", "content": "red"}
    encoder.encode(chat([{"role": "user", "content": "<image><video>"}, answered]))
    with pytest.raises(RecordError, match="or their order is another"):
        encoder.encode(chat([{"role": "user", "content": "<video><image>"}, answered]))


def test_data_of_the_earlier_plain_template_is_still_known() -> None:
    template = load_chat_template("plain")
    assert template.is_the_one_of(template.sha256)
    assert template.is_the_one_of("fbca264fb586a15ea4b1280d546aa9d1eef1d20635bb3075c0c89b3a299a69ee")
    assert not template.is_the_one_of("0" * 64)
    assert not load_chat_template("chatml").is_the_one_of(template.sha256)


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "has not written the"),
        ("{% set ns = namespace(a='ab') %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor %}", "MiB to"),
        ("{{ 'a' * 9999999999 }}", "takes more than 1024 MiB to write the conversation"),
        ("{{ messages[0].role * 29999999 }}", r"makes \d+ characters of the conversation, more than 67108864"),
        ("{% for i in range(999999999) %}a{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 1 // 0 }}", "by zero"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{{ ().__class__.__bases__ }}", "unsafe"),
    ],
)
def test_a_template_that_does_not_end_or_takes_everything(
    tiny_spm_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loop: str, message: str
) -> None:
    """At the start, and in a conversation that alone sets it off."""
    if message.startswith("has not"):
        monkeypatch.setattr(chat_template, "RENDER_SECONDS", 0.5)
    usual = "{% for m in messages %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endfor %}"
    (tmp_path / "always.jinja").write_text(usual + loop)
    (tmp_path / "once.jinja").write_text(usual + "{% if messages[0].content == 'now' %}" + loop + "{% endif %}")
    tokenizer = load_tokenizer(tiny_spm_model)
    handler = signal.getsignal(signal.SIGALRM)
    with pytest.raises(ValueError, match=f"chat template 'always' .*{message}"):
        ConversationEncoder(tokenizer, load_chat_template(str(tmp_path / "always.jinja")))
    encoder = ConversationEncoder(tokenizer, load_chat_template(str(tmp_path / "once.jinja")))
    with pytest.raises(RecordError, match=message) as error:
        encoder.encode(Record((Message("user", ("now",)), Message("assistant", ("b",)))))
    assert error.value.reason == Reason.TEMPLATE
    # Nothing of the limits stays behind.
    encoder.encode(Record((Message("user", ("a",)), Message("assistant", ("b",)))))
    assert signal.getsignal(signal.SIGALRM) == handler and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
