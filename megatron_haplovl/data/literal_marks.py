"""Keep a written-out `<image>` or `<video>` as the text that it is.

A tokenizer reads every mark in a text as an image or a video. Where a record's text writes a mark out, marks and
stand-ins change places: the text is rendered with stand-ins for what is written out, and tokenized with stand-ins for
the real images, by a tokenizer that knows the stand-ins as the special tokens and the marks as nothing special. A
stand-in has as many characters as its mark, so positions in the text stay what they are.
"""

from __future__ import annotations

import json
import re
from typing import Any

from tokenizers import Tokenizer

from megatron_haplovl.data.records import Reason, RecordError
from megatron_haplovl.data.tokenizer import IMAGE_MARK, VIDEO_MARK, TextTokenizer

# Private-use characters, which no text has a reason to hold.
_CHARACTERS = {IMAGE_MARK: "\U0010fff0", VIDEO_MARK: "\U0010fff1"}
_STAND_INS = {mark: character * len(mark) for mark, character in _CHARACTERS.items()}
_PARTNERS = _STAND_INS | {stand_in: mark for mark, stand_in in _STAND_INS.items()}
_EITHER = re.compile("|".join(map(re.escape, _PARTNERS)))


def has_literal_mark(text: str) -> bool:
    """Whether a text writes a mark out."""
    return any(mark in text for mark in _STAND_INS)


def exchange(text: str) -> str:
    """The text with a stand-in for every mark and a mark for every stand-in; its length does not change."""
    return _EITHER.sub(lambda match: _PARTNERS[match.group()], text)


class LiteralTokenizer:
    """The same tokenizer without marks: `<image>` and `<video>` are text, their stand-ins are the images and videos.

    Args:
        tokenizer: the tokenizer with marks.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._backend = Tokenizer.from_str(_with_stand_ins(tokenizer.hf.backend_tokenizer.to_str()))
        ids = tuple(self._backend.token_to_id(stand_in) for stand_in in _STAND_INS.values())
        assert ids == tokenizer.placeholder_ids
        self._unwritable = [mark for mark in _STAND_INS if not self._can_write(mark)]

    def _can_write(self, mark: str) -> bool:
        ids, _ = self.encode(mark)
        # A tokenizer of whole words joins them with spaces.
        return "".join(str(self._tokenizer.hf.decode(ids)).split()) == mark

    def check(self, text: str) -> None:
        """Refuse a text in which a mark cannot be kept as text.

        Raises:
            RecordError: the tokenizer has no other tokens for a mark, or the text holds a character of a stand-in.
        """
        for mark in self._unwritable:
            if mark in text:
                raise RecordError(
                    Reason.RESERVED_TOKEN,
                    f"the text writes {mark!r} out, and the tokenizer has nothing but one token for it, which stands "
                    "for a medium; write it in another way",
                )
        for character in _CHARACTERS.values():
            if character in text:
                raise RecordError(
                    Reason.RESERVED_TOKEN,
                    f"the text holds the private-use character U+{ord(character):X}, which stands for a medium where "
                    f"{' or '.join(_STAND_INS)} is written out",
                )

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As `TextTokenizer.encode`, of a text in which marks are text and stand-ins are media."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return list(encoding.ids), list(encoding.offsets)


def _with_stand_ins(serialized: str) -> str:
    """A tokenizer.json in which the marks' tokens have the stand-ins for their content, under the same ids."""
    tokenizer: dict[str, Any] = json.loads(serialized)
    for token in tokenizer["added_tokens"]:
        token["content"] = _STAND_INS.get(token["content"], token["content"])
    model = tokenizer["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [[_STAND_INS.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {_STAND_INS.get(piece, piece): token_id for piece, token_id in model["vocab"].items()}
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if "".join(pair) not in _STAND_INS]
    return json.dumps(tokenizer)
