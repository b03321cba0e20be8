"""Train a small sentencepiece tokenizer on LLaVA records; save its .model and a Hugging Face tokenizer folder."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from megatron_haplovl.data.tokenizer import IMAGE_MARK, VIDEO_MARK, load_tokenizer

# The fixed words of the chat template, so that each becomes one token.
_TEMPLATE_WORDS = "USER: ASSISTANT:\nUSER:"
_MAX_REPEATS = 50


def main() -> None:
    args = build_parser().parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    model_file = args.output / "tokenizer.model"
    train_sentencepiece(args.input, args.vocab_size, model_file)
    tokenizer = load_tokenizer(model_file)
    tokenizer.hf.save_pretrained(args.output)
    example = next(_texts(args.input[0])).replace(IMAGE_MARK, "").strip()
    ids, _ = tokenizer.encode(example)
    print(f"{tokenizer.vocab_size} tokens; {len(example.split())} words become {len(ids)} tokens: {example!r}")


def train_sentencepiece(inputs: list[Path], vocab_size: int, model_file: Path) -> None:
    """Train a BPE model with byte fallback, `<image>` and `<video>`: it encodes any text without an unknown token.

    Args:
        inputs: LLaVA JSON files; every `value` in them is training text.
        vocab_size: an upper limit: a small corpus may not hold that many distinct pieces.
        model_file: receives the sentencepiece model.
    """
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_sentences(inputs),
        model_prefix=str(model_file.with_suffix("")),
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        # Not at their usual places: transformers' CLIP takes an end-of-sequence id of 2 for something else.
        unk_id=0,
        bos_id=1,
        pad_id=2,
        eos_id=3,
        character_coverage=1.0,
        user_defined_symbols=[IMAGE_MARK, VIDEO_MARK],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    model_file.with_suffix(".vocab").unlink()


def _sentences(inputs: list[Path]) -> Iterator[str]:
    """Every distinct text twice: as a sentence of its own, and behind a line break, where no space precedes it."""
    counts = Counter(text for path in inputs for text in _texts(path))
    counts[_TEMPLATE_WORDS] = max(counts.values())
    for text, count in counts.items():
        words = text.replace(IMAGE_MARK, "").replace(VIDEO_MARK, "").strip()
        for _ in range(min(count, _MAX_REPEATS)):
            yield words
            yield "\n" + words


def _texts(path: Path) -> Iterator[str]:
    for record in json.loads(path.read_text(encoding="utf-8")):
        for turn in record["conversations"]:
            yield turn["value"]


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="LLaVA JSON files")
    parser.add_argument("--vocab-size", type=int, default=768, help="size of the vocabulary")
    parser.add_argument("--output", type=Path, required=True, help="folder for tokenizer.model and the HF tokenizer")
    return parser


if __name__ == "__main__":
    main()
