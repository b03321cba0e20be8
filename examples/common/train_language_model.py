"""Train a small Llama on conversations, images left out, and save it as a Hugging Face LlamaForCausalLM folder.

It has the sizes of a HaploVL preset's post-decoder, so that it can initialise it. The file `teacher.json` beside the
weights says how well it predicts and answers held-out conversations.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from examples.common.samples import endless_batches, load_records, pad_tokens
from examples.common.teacher_loop import train
from megatron_haplovl.config.presets import MODELS
from megatron_haplovl.config.schema import ModelConfig
from megatron_haplovl.conversion.hf_compatibility import language_config_of
from megatron_haplovl.data.chat_template import ConversationEncoder, load_chat_template
from megatron_haplovl.data.records import Record
from megatron_haplovl.data.tokenizer import TextTokenizer, load_tokenizer


def build_llama(model: ModelConfig, tokenizer: TextTokenizer, vocab_size: int) -> LlamaForCausalLM:
    """A Llama with random weights and the sizes of `model`'s post-decoder.

    Args:
        model: sizes.
        tokenizer: its special tokens go into the configuration.
        vocab_size: rows of the embedding; some may be spare.

    Raises:
        ValueError: the tokenizer has more tokens than that, or the post-decoder has biases of q, k and v.
    """
    if vocab_size < tokenizer.vocab_size:
        raise ValueError(f"--vocab-size {vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size} tokens")
    config = language_config_of(
        dataclasses.replace(model, vocab_size=vocab_size),
        initializer_range=model.post.hidden_size**-0.5,
        bos_token_id=tokenizer.hf.bos_token_id,
        eos_token_id=tokenizer.hf.eos_token_id,
        pad_token_id=tokenizer.hf.pad_token_id,
    )
    if not isinstance(config, LlamaConfig):
        raise ValueError("a preset with biases of q, k and v has a Qwen2 as its language model, not a Llama")
    return LlamaForCausalLM(config)


class ConversationBatches:
    """Conversations in memory, tokenized when they are drawn."""

    def __init__(self, records: list[Record], encoder: ConversationEncoder) -> None:
        self.records = records
        self.encoder = encoder
        self.pad_id = int(encoder.tokenizer.hf.pad_token_id)

    def draw(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids, real-token mask and answer mask, all [B, S]."""
        encoded = [self.encoder.encode(self.records[i]) for i in indices]
        ids_BS, real_BS = pad_tokens([e.token_ids for e in encoded], self.pad_id)
        answer_BS, _ = pad_tokens([e.loss_mask for e in encoded], 0)
        return ids_BS, real_BS, answer_BS


def token_losses(llama: LlamaForCausalLM, ids_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy and correctness of every token but the first, both [B, S - 1].

    Padding is on the right, where causal attention cannot see it, so no mask is needed.
    """
    logits_BSV = llama(input_ids=ids_BS).logits[:, :-1].float()
    targets_BS = ids_BS[:, 1:]
    losses_BS = F.cross_entropy(logits_BSV.transpose(1, 2), targets_BS, reduction="none")
    return losses_BS, logits_BSV.argmax(dim=-1) == targets_BS


@torch.no_grad()
def evaluate(llama: LlamaForCausalLM, data: ConversationBatches, batch_size: int) -> dict[str, float]:
    """Perplexity of all tokens, and share of the answer tokens that are predicted right."""
    loss = tokens = right = answers = 0.0
    for first in range(0, len(data.records), batch_size):
        ids_BS, real_BS, answer_BS = data.draw(list(range(first, min(first + batch_size, len(data.records)))))
        losses_BS, right_BS = token_losses(llama, ids_BS)
        loss += float((losses_BS * real_BS[:, 1:]).sum())
        tokens += float(real_BS[:, 1:].sum())
        right += float((right_BS * answer_BS[:, 1:]).sum())
        answers += float(answer_BS[:, 1:].sum())
    return {"heldout_perplexity": math.exp(loss / tokens), "heldout_answer_token_accuracy": right / answers}


def main() -> None:
    args = build_parser().parse_args()
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.tokenizer_model)
    encoder = ConversationEncoder(tokenizer, load_chat_template(args.chat_template))
    data = ConversationBatches([r for path in args.train for r in load_records(path)], encoder)
    heldout = ConversationBatches(load_records(args.heldout), encoder)
    llama = build_llama(MODELS[args.model], tokenizer, args.vocab_size)
    indices = endless_batches(len(data.records), args.batch_size, random.Random(args.seed))

    def loss_of_step() -> torch.Tensor:
        ids_BS, real_BS, answer_BS = data.draw(next(indices))
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            losses_BS, _ = token_losses(llama, ids_BS)
        # Questions and descriptions are drawn at random: most of their tokens teach nothing but frequencies.
        weight_BS = torch.where(answer_BS[:, 1:] == 1, 1.0, args.prompt_loss_weight) * real_BS[:, 1:]
        return (losses_BS * weight_BS).sum() / weight_BS.sum()

    train(llama, loss_of_step, steps=args.steps, lr=args.lr, name="language model")
    report = evaluate(llama, heldout, args.batch_size)
    print(
        f"language model: held-out perplexity {report['heldout_perplexity']:.2f}, "
        f"{report['heldout_answer_token_accuracy']:.1%} of the answer tokens right"
    )

    llama.save_pretrained(args.output)
    tokenizer.hf.save_pretrained(args.output)
    (args.output / "teacher.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--train", type=Path, nargs="+", required=True, help="LLaVA JSON files; an image is one token to it"
    )
    parser.add_argument("--heldout", type=Path, required=True, help="held-out LLaVA JSON")
    parser.add_argument("--tokenizer-model", type=Path, required=True, help="tokenizer folder or .model")
    parser.add_argument(
        "--chat-template", default="examples/common/brief.jinja", help="template that renders the conversations"
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="haplovl-debug", help="preset whose sizes are used")
    parser.add_argument("--vocab-size", type=int, required=True, help="rows of the embedding")
    parser.add_argument("--output", type=Path, required=True, help="folder that receives the LlamaForCausalLM")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=8, help="conversations in a batch")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--prompt-loss-weight", type=float, default=0.1, help="weight of tokens that are no answer")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--seed", type=int, default=1234, help="seed of weights and order")
    return parser


if __name__ == "__main__":
    main()
