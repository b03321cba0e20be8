"""The fast tokenizer against sentencepiece itself, and the image marks."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import normalizers

from megatron_haplovl.data.tokenizer import TextTokenizer, load_tokenizer
from megatron_haplovl.data.tokenizer_fingerprint import PROBES, blind_spot, same_tokenizer
from tests.conftest import llama_folder, train_sentencepiece

_WORDS = [
    "What ",
    "color",
    " is",
    "circle",
    " ",
    "  ",
    "\n",
    "\t",
    "99",
    "Z",
    "é",
    "日本",
    "…",
    "🙂",
    "q.",
    "<",
    ">",
    "▁",
]


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "bpe"},
        {"model_type": "unigram"},
        {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        {"model_type": "unigram", "normalization_rule_name": "identity"},
        {"model_type": "bpe", "byte_fallback": False},
        {"model_type": "unigram", "add_dummy_prefix": False},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_ids_equal_those_of_sentencepiece(tmp_path: Path, options: dict[str, Any]) -> None:
    model = train_sentencepiece(tmp_path, **options)
    tokenizer = load_tokenizer(model)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model))
    choose = random.Random(0)
    for _ in range(300):
        text = "".join(choose.choices(_WORDS, k=choose.randint(0, 20)))
        ids, offsets = tokenizer.encode(text)
        assert ids == reference.encode(text), text
        assert len(offsets) == len(ids)


def test_decoding_gives_the_text_back(tiny_spm_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_spm_model)
    text = "The circle is red, 12 of them. é日"
    assert tokenizer.hf.decode(tokenizer.encode(text)[0]) == text


def test_image_and_video_marks_follow_the_last_id(tiny_spm_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_spm_model)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tiny_spm_model)).GetPieceSize()
    assert (tokenizer.image_token_id, tokenizer.video_token_id) == (pieces, pieces + 1)
    assert tokenizer.vocab_size == pieces
    ids, _ = tokenizer.encode("a <image>\n<image> b")
    assert ids.count(pieces) == 2


def test_marks_that_the_tokenizer_has_keep_their_ids(tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path, control_symbols=["<image>", "<video>"])
    tokenizer = load_tokenizer(model)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert tokenizer.image_token_id == pieces.PieceToId("<image>")
    assert tokenizer.vocab_size == pieces.GetPieceSize()


def test_saved_folder_is_the_same_tokenizer(tmp_path: Path, tiny_spm_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_spm_model)
    tokenizer.hf.save_pretrained(tmp_path / "hf")
    again = load_tokenizer(tmp_path / "hf")
    assert again.fingerprint == tokenizer.fingerprint
    assert again.placeholder_ids == tokenizer.placeholder_ids
    assert again.hf.eos_token == "</s>"


def test_fingerprint_tells_tokenizers_apart(tmp_path: Path, tiny_spm_model: Path) -> None:
    other = train_sentencepiece(tmp_path, vocab_size=400)
    no_prefix = train_sentencepiece(tmp_path, name="no_prefix", add_dummy_prefix=False)
    prints = {load_tokenizer(path).fingerprint for path in (tiny_spm_model, other, no_prefix)}
    assert len(prints) == 3


def test_fingerprint_sees_what_the_vocabulary_does_not_show(tiny_spm_model: Path) -> None:
    tokenizer, changed = load_tokenizer(tiny_spm_model), load_tokenizer(tiny_spm_model)
    changed.hf.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert changed.hf.get_vocab() == tokenizer.hf.get_vocab()
    assert changed.fingerprint != tokenizer.fingerprint


def _old_kind(tokenizer: TextTokenizer) -> str:
    """The fingerprint as manifests of format 1 hold it, written out here once more."""
    hf = tokenizer.hf
    behaviour = {
        "vocab": hf.get_vocab(),
        "added": {token.content: (i, token.special) for i, token in hf.added_tokens_decoder.items()},
        "roles": [hf.bos_token_id, hf.eos_token_id],
        "probes": [tokenizer.encode(text)[0] for text in PROBES],
    }
    return hashlib.sha256(json.dumps(behaviour, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def test_fingerprint_sees_what_happens_around_special_tokens(tmp_path: Path) -> None:
    """A Llama folder with and without `legacy`: one vocabulary, one encoding of plain text, two of a conversation."""
    legacy, new = (load_tokenizer(llama_folder(tmp_path / str(legacy), legacy=legacy)) for legacy in (True, False))
    conversation = "<s>What is it?<image>red</s>"
    assert [legacy.encode(text) for text in PROBES] == [new.encode(text) for text in PROBES]
    assert legacy.encode(conversation)[0] != new.encode(conversation)[0]
    assert _old_kind(legacy) == _old_kind(new)
    assert not same_tokenizer(legacy.fingerprint, new.fingerprint)


def test_fingerprints_of_the_old_kind_are_compared_in_what_they_see(tmp_path: Path, tiny_spm_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_spm_model)
    other = load_tokenizer(train_sentencepiece(tmp_path, vocab_size=400))
    old = _old_kind(tokenizer)
    assert same_tokenizer(old, tokenizer.fingerprint) and same_tokenizer(tokenizer.fingerprint, old)
    assert same_tokenizer(old, old) and same_tokenizer(tokenizer.fingerprint, tokenizer.fingerprint)
    assert not same_tokenizer(old, other.fingerprint) and not same_tokenizer(_old_kind(other), old)
    assert "does not see how text is read around special tokens" in str(blind_spot(old))
    assert blind_spot(tokenizer.fingerprint) is None


def test_what_is_not_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "junk.model").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"junk\.model is not a sentencepiece model"):
        load_tokenizer(tmp_path / "junk.model")
    with pytest.raises(ValueError, match="cannot be loaded as a Hugging Face tokenizer"):
        load_tokenizer(tmp_path)


def test_unsupported_kind_of_sentencepiece_model(tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path, model_type="char")
    with pytest.raises(ValueError, match="only unigram and BPE"):
        load_tokenizer(model)
