"""What a tokenizer does, as a short text to compare: of data, of a run and of an export.

A fingerprint is `2:BASE:SPECIAL`, two SHA-256 in hex. BASE is all that a fingerprint of the first kind was: the
vocabulary, the added tokens and the ids of texts without special tokens. SPECIAL sees what happens around special
tokens, where tokenizers with one and the same BASE differ (a Llama folder with `"legacy": true` puts a space behind
each special token). Manifests of format 1 hold BASE alone.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from transformers import PreTrainedTokenizerFast

_KIND = "2"

# Together these texts show normalizer, whitespace, digits, byte fallback and merges.
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "  Two  spaces,\ta tab,\nand a line break \n",
    "3.14159 + 2,718 = 1/2? (Yes!) [No]; e-mail: a_b@c.org",
    "Café naïve — “quotes” … ½ ﬁ",
    "日本語のテキスト 中文",
    "if x == y:\n    return {'a': [1, 2]}",
)
# Each added token stands in the place of the braces: at both ends, within a word, and beside every kind of whitespace.
_AROUND_SPECIAL = "{0}What{0} is it?{0}A{0}{0} 3 boats {0}  here\n{0}\nor {0}\tthere.\n\n{0}"


def compute_fingerprint(hf: PreTrainedTokenizerFast) -> str:
    """The fingerprint of a tokenizer, `2:BASE:SPECIAL`.

    It depends on what the tokenizer does and not on how its files are written: a sentencepiece model and the folder
    saved from it have the same fingerprint.
    """
    added = {token.content: (i, token.special) for i, token in hf.added_tokens_decoder.items()}
    base = {
        "vocab": hf.get_vocab(),
        "added": added,
        "roles": [hf.bos_token_id, hf.eos_token_id],
        "probes": [_encode(hf, text) for text in PROBES],
    }
    special = {content: _encode(hf, _AROUND_SPECIAL.format(content)) for content in added}
    return f"{_KIND}:{_hash(base)}:{_hash(special)}"


def same_tokenizer(one: str, other: str) -> bool:
    """Whether two fingerprints may be those of one tokenizer: equal, or equal in what an old one sees."""
    if _is_new(one) and _is_new(other):
        return one == other
    return _base(one) == _base(other)


def blind_spot(fingerprint: str) -> str | None:
    """What a comparison with this fingerprint cannot show, as half a sentence; None if it is of today's kind."""
    if _is_new(fingerprint):
        return None
    return (
        "its tokenizer fingerprint is of the old kind, which does not see how text is read around special tokens; "
        "preprocess again to have that compared, too"
    )


def shorten(fingerprint: str) -> str:
    """Enough of a fingerprint to tell two apart by eye."""
    return ":".join(part[:12] for part in fingerprint.split(":"))


def _is_new(fingerprint: str) -> bool:
    return fingerprint.startswith(f"{_KIND}:")


def _base(fingerprint: str) -> str:
    return fingerprint.split(":")[1] if _is_new(fingerprint) else fingerprint


def _encode(hf: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(hf(text, add_special_tokens=False)["input_ids"])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
