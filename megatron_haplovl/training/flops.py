"""Arithmetic of one step, for the throughput in the log."""

from __future__ import annotations

from megatron_haplovl.config.schema import ModelConfig
from megatron_haplovl.config.stages import StageSpec


def training_flops(model: ModelConfig, *, tokens: int, head_tokens: int, visible_pairs: int, stage: StageSpec) -> float:
    """Floating-point operations of forward and backward: 6 per matrix weight and token, attention by its true mask.

    Args:
        model: sizes.
        tokens: tokens that are not padding.
        head_tokens: tokens whose vocabulary logits are computed.
        visible_pairs: (query, key) pairs under the mixed mask.
        stage: the training's stage, which decides whether there is a post-decoder.
    """
    pre, post = model.pre, model.post
    mlp_matrices = 3 if pre.gated_mlp else 2
    pre_block = 4 * pre.hidden_size**2 + mlp_matrices * pre.hidden_size * pre.ffn_hidden_size
    matrices = pre.num_layers * pre_block * tokens + model.vocab_size * post.hidden_size * head_tokens
    # q k^T and the weighted sum of v: 4 per pair and channel forward, twice that backward.
    attention = pre.num_layers * pre.hidden_size * visible_pairs
    if "post_decoder" in stage.layers:
        kv_width = post.hidden_size // post.num_attention_heads * post.num_key_value_heads
        post_block = (
            2 * post.hidden_size**2 + 2 * post.hidden_size * kv_width + 3 * post.hidden_size * post.ffn_hidden_size
        )
        matrices += (post.num_layers * post_block + pre.hidden_size * post.hidden_size) * tokens
        attention += post.num_layers * post.hidden_size * visible_pairs
    return 6.0 * matrices + 12.0 * attention
