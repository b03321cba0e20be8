"""A mark that a text writes out stays text: the ids of a tokenizer without marks, and the same text when decoded."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_haplovl.data.chat_template import ConversationEncoder, load_chat_template
from megatron_haplovl.data.literal_marks import LiteralTokenizer, exchange, has_literal_mark
from megatron_haplovl.data.records import Image, Message, Part, Reason, Record, RecordError, Video
from megatron_haplovl.data.tokenizer import load_tokenizer
from tests.conftest import byte_level_folder, llama_folder, train_sentencepiece

_IDENTITY: dict[str, Any] = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
_IMAGE, _VIDEO = Image(path="a.png"), Video(path="a.mp4")
_KINDS = (
    "bpe",
    "unigram",
    "bpe that has the marks",
    "unigram that has the marks",
    "llama",
    "legacy llama",
    "byte level",
    "byte level that has the marks",
)


def _model(folder: Path, kind: str) -> Path:
    if kind.startswith(("bpe", "unigram")):
        marks = ["<image>", "<video>"] if "has the marks" in kind else []
        return train_sentencepiece(folder, model_type=kind.split()[0], control_symbols=marks, **_IDENTITY)
    if kind.endswith("llama"):
        return llama_folder(folder / "llama", legacy=kind.startswith("legacy"))
    path = byte_level_folder(folder / "bytes")
    if "has the marks" in kind:
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.add_tokens(["<video>", "<image>"], special_tokens=True)
        tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=_KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _model(tmp_path_factory.mktemp("model"), request.param)


def _document(*parts: Part) -> Record:
    return Record((Message("user", parts),), is_document=True)


def test_ids_are_those_of_a_tokenizer_without_marks(model: Path) -> None:
    """A tokenizer that never heard of the marks: sentencepiece itself, or the folder as transformers loads it."""
    encoder = ConversationEncoder(load_tokenizer(model), load_chat_template("plain"))
    text = "Write <image>, then <video><image>\nor <image>."
    ids = encoder.encode(_document(text)).token_ids.tolist()
    if model.is_file():
        expected = sentencepiece.SentencePieceProcessor(model_file=str(model)).encode(text)
    else:
        plain = AutoTokenizer.from_pretrained(model)
        if "<image>" in plain.get_vocab():
            plain = AutoTokenizer.from_pretrained(byte_level_folder(model.parent / "unmarked"))
        text = f"{encoder.tokenizer.hf.bos_token}{text}{encoder.tokenizer.hf.eos_token}"
        expected = plain(text, add_special_tokens=False)["input_ids"][1:-1]
    assert ids[1:-1] == expected
    assert not set(ids) & set(encoder.tokenizer.placeholder_ids)


@pytest.mark.parametrize("template", ["plain", "vicuna_v1"])
def test_beside_real_media(model: Path, template: str) -> None:
    """The real ones are placeholders, what is written out is decoded as it was, and the answers are trained."""
    encoder = ConversationEncoder(load_tokenizer(model), load_chat_template(template))
    question = (_IMAGE, "\nWhat does <image> mean, and ", _VIDEO, "<video>?")
    answer = "It means <video> or <image>."
    encoded = encoder.encode(Record((Message("user", question), Message("assistant", (answer,)))))
    image, video = encoder.tokenizer.placeholder_ids
    is_visual = np.isin(encoded.token_ids, (image, video))
    assert encoded.token_ids[is_visual].tolist() == [image, video]
    decode = encoder.tokenizer.hf.decode
    trained = str(decode(encoded.token_ids[encoded.loss_mask.astype(bool)].tolist()))
    assert trained.replace("</s>", "").strip() == answer
    whole = decode(encoded.token_ids[~is_visual].tolist())
    if template == "vicuna_v1":
        assert "What does <image> mean, and" in whole and "<video>? ASSISTANT:" in whole


def test_without_written_out_marks_both_tokenizers_are_one(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    literal = LiteralTokenizer(tokenizer)
    choose = random.Random(0)
    pieces = ["<image>", "<video>", "<s>", "</s>", "<im", "age>", " ", "\n", "What ", "is", "é", "日", "<", ">", "  "]
    for _ in range(200):
        text = "".join(choose.choices(pieces, k=choose.randint(0, 12)))
        assert literal.encode(exchange(text)) == tokenizer.encode(text), text


def test_mark_across_two_parts_of_text(model: Path) -> None:
    encoder = ConversationEncoder(load_tokenizer(model), load_chat_template("plain"))
    split, joined = encoder.encode(_document("a <ima", "ge> b")), encoder.encode(_document("a <image> b"))
    assert split.token_ids.tolist() == joined.token_ids.tolist()
    assert encoder.tokenizer.image_token_id not in joined.token_ids


def test_exchange_keeps_positions() -> None:
    text = "a<image>b<video><image>"
    assert len(exchange(text)) == len(text)
    assert exchange(exchange(text)) == text
    assert has_literal_mark(text) and not has_literal_mark(exchange(text))


def test_vocabulary_of_whole_words(tmp_path: Path) -> None:
    words = ["<unk>", "</s>", "a", "b", "<image>"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>").save_pretrained(tmp_path)
    encoder = ConversationEncoder(load_tokenizer(tmp_path), load_chat_template("plain"))
    assert encoder.encode(_document(_IMAGE, " a b")).token_ids.tolist() == [4, 2, 3, 1]
    with pytest.raises(
        RecordError, match="writes '<image>' out, and the tokenizer has nothing but one token"
    ) as caught:
        encoder.encode(_document("a <image> b"))
    assert caught.value.reason is Reason.RESERVED_TOKEN


def test_character_of_a_stand_in(tiny_spm_model: Path) -> None:
    encoder = ConversationEncoder(load_tokenizer(tiny_spm_model), load_chat_template("plain"))
    encoder.encode(_document("a \U0010fff0 b"))
    with pytest.raises(RecordError, match=r"private-use character U\+10FFF0"):
        encoder.encode(_document("a <image> \U0010fff0 b"))
