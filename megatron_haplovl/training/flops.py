"""Arithmetic of one step, for the throughput in the log."""

from __future__ import annotations

from collections.abc import Set

from megatron_haplovl.config.schema import ModelConfig
from megatron_haplovl.config.stages import StageSpec

_WORDS = "word matrix"
"""Stage 1's head, which no recipe trains."""


def training_flops(
    model: ModelConfig,
    *,
    tokens: int,
    head_tokens: int,
    visible_pairs: int,
    stage: StageSpec,
    trained: Set[str] | None = None,
) -> float:
    """Floating-point operations of forward and backward: 6 per matrix weight and token, attention by its true mask.

    A frozen matrix has no gradient of its own (4), and what lies before everything that trains has no backward (2).

    Args:
        model: sizes.
        tokens: tokens that are not padding.
        head_tokens: tokens whose vocabulary logits are computed.
        visible_pairs: (query, key) pairs under the mixed mask.
        stage: the training's stage, which decides whether there is a post-decoder.
        trained: parts that are trained; None: all.
    """
    pre, post = model.pre, model.post
    trained = {*stage.parts, _WORDS} if trained is None else trained
    mlp_matrices = 3 if pre.gated_mlp else 2
    pre_block = 4 * pre.hidden_size**2 + mlp_matrices * pre.hidden_size * pre.ffn_hidden_size
    # Part, weights of its matrices, tokens that pass through them, channels of its attention.
    work = [("pre_decoder", pre.num_layers * pre_block, tokens, pre.num_layers * pre.hidden_size)]
    if "post_decoder" in stage.layers:
        kv_width = post.hidden_size // post.num_attention_heads * post.num_key_value_heads
        post_block = (
            2 * post.hidden_size**2 + 2 * post.hidden_size * kv_width + 3 * post.hidden_size * post.ffn_hidden_size
        )
        work.append(("connector", pre.hidden_size * post.hidden_size, tokens, 0))
        work.append(("post_decoder", post.num_layers * post_block, tokens, post.num_layers * post.hidden_size))
    head = "post_decoder" if "post_decoder" in stage.layers else _WORDS
    work.append((head, model.vocab_size * post.hidden_size, head_tokens, 0))
    total, reached = 0.0, "embedding" in trained
    for part, weights, passing, channels in work:
        # The gradient of its input is needed if anything before it is trained, that of its output if it is itself.
        input_gradient, own = reached, part in trained
        reached = reached or own
        total += (2.0 + 2.0 * input_gradient + 2.0 * own) * weights * passing
        # q k^T and the weighted sum of v: 4 per pair and channel forward, twice that backward.
        total += (12.0 if reached else 4.0) * channels * visible_pairs
    return total
