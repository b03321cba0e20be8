"""Load any Hugging Face tokenizer folder, or a bare sentencepiece model, as one fast tokenizer with image marks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_haplovl.data.tokenizer_fingerprint import PROBES, compute_fingerprint

IMAGE_MARK = "<image>"
"""Stands for one image in a conversation; one token in preprocessed files."""
VIDEO_MARK = "<video>"
"""Stands for one video."""

_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # SentencePiece.Type


@dataclass(frozen=True)
class TextTokenizer:
    """A fast tokenizer with `<image>` and `<video>` as single tokens. Made by :func:`load_tokenizer`."""

    hf: PreTrainedTokenizerFast
    """The Hugging Face tokenizer; `hf.save_pretrained(folder)` writes a folder that `load_tokenizer` reads."""
    image_token_id: int
    video_token_id: int

    @property
    def placeholder_ids(self) -> tuple[int, int]:
        """Ids that stand for an image or a video; they are never embedded nor predicted."""
        return self.image_token_id, self.video_token_id

    @cached_property
    def vocab_size(self) -> int:
        """Rows that a text embedding needs at least: one past the largest id that is no placeholder."""
        return 1 + max(i for i in self.hf.get_vocab().values() if i not in self.placeholder_ids)

    @cached_property
    def fingerprint(self) -> str:
        """What the tokenizer does, to compare; see :mod:`megatron_haplovl.data.tokenizer_fingerprint`."""
        return compute_fingerprint(self.hf)

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and the characters `[start, end)` of `text` behind each one. Special tokens in `text` are
        recognised; none is added."""
        encoding = self.hf(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoding["input_ids"]), [(int(a), int(b)) for a, b in encoding["offset_mapping"]]

    def token_id(self, token: str) -> int | None:
        """Id of a single token, or None if the tokenizer does not know it as one."""
        vocab: dict[str, int] = self._vocab
        return vocab.get(token)

    @cached_property
    def _vocab(self) -> dict[str, int]:
        return dict(self.hf.get_vocab())


def load_tokenizer(path: str | Path) -> TextTokenizer:
    """Load a tokenizer.

    If it has no `<image>` and `<video>` tokens, they are added behind its last id.

    Args:
        path: a Hugging Face tokenizer folder, or a sentencepiece `.model` file.

    Raises:
        ValueError: there is nothing at `path`, or it cannot be used as a fast tokenizer.
    """
    path = Path(path)
    if path.is_file():
        hf = _from_sentencepiece(path)
    elif path.is_dir():
        hf = _from_folder(path)
    else:
        raise ValueError(f"no tokenizer at {path}: neither a Hugging Face folder nor a sentencepiece .model file")
    # Added one by one, so that the ids do not depend on how a version of transformers orders a list.
    for mark in (IMAGE_MARK, VIDEO_MARK):
        hf.add_tokens([AddedToken(mark, special=True, normalized=False)], special_tokens=True)
    vocab = hf.get_vocab()
    return TextTokenizer(hf, vocab[IMAGE_MARK], vocab[VIDEO_MARK])


def _from_folder(path: Path) -> PreTrainedTokenizerFast:
    try:
        hf: Any = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False, use_fast=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be loaded as a Hugging Face tokenizer: {error}") from error
    if not isinstance(hf, PreTrainedTokenizerFast):
        raise ValueError(f"{path} holds a slow tokenizer ({type(hf).__name__}); a tokenizer.json is needed")
    return hf


def _from_sentencepiece(path: Path) -> PreTrainedTokenizerFast:
    """Build the equivalent fast tokenizer, and prove on a few texts that its ids are sentencepiece's own."""
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.Load(str(path))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} is not a sentencepiece model: {error}") from error
    # Imported here, because it refuses to load beside an older protobuf, and Hugging Face folders do not need it.
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(processor.serialized_model_proto())
    backend = _build_backend(proto, path)
    for text in PROBES:
        expected = processor.EncodeAsIds(text)
        got = backend.encode(text, add_special_tokens=False).ids
        if got != expected:
            raise ValueError(
                f"{path}: the fast tokenizer gives {got} for {text!r}, sentencepiece {expected}; convert the model to "
                "a Hugging Face tokenizer folder and give that"
            )
    roles = {"unk_token": processor.unk_id(), "bos_token": processor.bos_id(), "eos_token": processor.eos_id()}
    names: dict[str, Any] = {role: processor.IdToPiece(i) for role, i in roles.items() if i >= 0}
    if processor.pad_id() >= 0:
        names["pad_token"] = processor.IdToPiece(processor.pad_id())
    fast: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **names
    )
    return fast


def _build_backend(proto: Any, path: Path) -> Tokenizer:
    """The `tokenizers` equivalent of a sentencepiece model.

    Each stretch of text between two special tokens (or user-defined symbols) is encoded as sentencepiece encodes it on
    its own, that is with a dummy prefix if the model has one.
    """
    spec, normalization = proto.trainer_spec, proto.normalizer_spec
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    if spec.treat_whitespace_as_suffix or not normalization.escape_whitespaces:
        raise ValueError(f"{path}: sentencepiece models with whitespace as a suffix or unescaped are not supported")
    if spec.model_type == _UNIGRAM:
        unk = next(i for i, piece in enumerate(proto.pieces) if piece.type == _UNKNOWN)
        model: Any = models.Unigram(pieces, unk_id=unk, byte_fallback=spec.byte_fallback)
    elif spec.model_type == _BPE:
        vocab = {piece: i for i, (piece, _) in enumerate(pieces)}
        model = models.BPE(
            vocab, _merges(proto), unk_token=spec.unk_piece, fuse_unk=True, byte_fallback=spec.byte_fallback
        )
    else:
        raise ValueError(f"{path}: only unigram and BPE sentencepiece models are supported, not type {spec.model_type}")
    backend = Tokenizer(model)

    steps: list[Any] = []
    if normalization.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normalization.precompiled_charsmap))
    if normalization.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +|[ ▁]+\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if normalization.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])

    decoding: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if normalization.add_dummy_prefix:
        decoding.append(decoders.Strip(content=" ", left=1, right=0))
    backend.decoder = decoders.Sequence(decoding)

    backend.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL)
            for piece in proto.pieces
            if piece.type in (_CONTROL, _USER_DEFINED)
        ]
    )
    return backend


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Merges of a BPE model. Sentencepiece does not store them: any two pieces may join to a third, and the piece with
    the better score joins first."""
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    merges: list[tuple[float, int, int, str, str]] = []
    for piece, score in normal.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in normal and right in normal:
                merges.append((-score, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]
