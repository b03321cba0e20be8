"""Cost of a transformer block of either decoder."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_haplovl.config.layout import Layout
from megatron_haplovl.config.schema import ModelConfig
from megatron_haplovl.planning.cost_units import LayerCost, Operations, Precision, all_reduce_bytes, linear, norm_saved
from megatron_haplovl.planning.work import Work

RECOMPUTED: dict[str, tuple[str, ...]] = {"none": (), "selective": ("mlp",), "full": ("attention", "mlp")}
"""--recompute-granularity -> halves of a block whose inside backward computes again.

`selective` is Megatron's (parts of a block), with its module `mlp`: norm, projections and activation. Recomputing
Megatron's default module, the core of attention, would gain nothing here: every fused backend already recomputes the
scores, so it would free one number per query and head.
"""


@dataclass(frozen=True)
class Decoder:
    """What the two kinds of block differ in. Sizes are those of the whole layer, before it is split."""

    width: int
    ffn: int
    queries: int
    keys: int
    heads: int
    head_width: int
    gated: bool
    activation_inputs: int
    """Tensors of the MLP's width that the activation keeps: its inputs and, if it is not fused with the gate's product,
    its output."""
    biases: bool
    qkv_bias: bool
    layer_norm: bool

    @property
    def matrices(self) -> int:
        """Elements of the weight matrices."""
        return self.attention_matrices + self.mlp_matrices

    @property
    def attention_matrices(self) -> int:
        """Elements of q, k, v and o."""
        return 2 * self.width * (self.queries + self.keys)

    @property
    def mlp_matrices(self) -> int:
        """Elements of the MLP's matrices."""
        return (3 if self.gated else 2) * self.width * self.ffn

    @property
    def split_vectors(self) -> int:
        """Elements of the biases of column-parallel layers."""
        qkv = self.queries + 2 * self.keys if self.qkv_bias else 0
        return qkv + ((2 if self.gated else 1) * self.ffn if self.biases else 0)

    @property
    def whole_vectors(self) -> int:
        """Elements of norms and of the biases of row-parallel layers: every tensor rank has them."""
        norms = 4 * self.width if self.layer_norm else 2 * self.width
        return norms + (2 * self.width if self.biases else 0)


def pre_decoder_sizes(model: ModelConfig) -> Decoder:
    """The pre-decoder's block."""
    pre = model.pre
    return Decoder(
        width=pre.hidden_size,
        ffn=pre.ffn_hidden_size,
        queries=pre.hidden_size,
        keys=pre.hidden_size,
        heads=pre.num_attention_heads,
        head_width=pre.hidden_size // pre.num_attention_heads,
        gated=pre.gated_mlp,
        activation_inputs=3 if pre.gated_mlp else 1,
        biases=True,
        qkv_bias=True,
        layer_norm=True,
    )


def post_decoder_sizes(model: ModelConfig) -> Decoder:
    """The post-decoder's block."""
    post = model.post
    head_width = post.hidden_size // post.num_attention_heads
    return Decoder(
        width=post.hidden_size,
        ffn=post.ffn_hidden_size,
        queries=post.hidden_size,
        keys=head_width * post.num_key_value_heads,
        heads=post.num_attention_heads,
        head_width=head_width,
        gated=True,
        activation_inputs=2,
        biases=post.linear_bias,
        qkv_bias=post.qkv_bias,
        layer_norm=False,
    )


def block_cost(
    decoder: Decoder, work: Work, layout: Layout, precision: Precision, trained: bool, path: bool
) -> LayerCost:
    """One block, without a name.

    Args:
        decoder: sizes of the block.
        work: one micro-batch, whole.
        layout: how ranks share the block.
        precision: number formats.
        trained: whether its weights train.
        path: whether anything before it trains.
    """
    tokens, element = work.tokens / layout.context, precision.element
    active = trained or path
    again = RECOMPUTED[layout.recompute] if active else ()
    # Outside the products the residual stream is whole on every tensor rank, or split with --sequence-parallel.
    norm_tokens = tokens / (layout.tensor if layout.sequence_parallel else 1)
    state_bytes = precision.residual * decoder.width * norm_tokens
    ffn_bytes = element * decoder.ffn * tokens / layout.tensor

    scores = Operations(attention=4.0 * decoder.queries * work.pairs / (layout.tensor * layout.context))
    forward, backward = linear(decoder.matrices / layout.tensor, tokens, trained, active)
    recomputed = Operations()
    if "attention" in again:
        recomputed += Operations(2.0 * decoder.attention_matrices / layout.tensor * tokens) + scores
    if "mlp" in again:
        # Recomputing stops at the last tensor that backward needs, the down projection's input.
        needed = decoder.mlp_matrices - decoder.width * decoder.ffn
        recomputed += Operations(2.0 * needed / layout.tensor * tokens)

    # Forward reads or writes so many tensors of a width: two norms (2 each), two sums (3 each), the rotation of queries
    # and keys (6), the activation (2, or 3 if gated). Backward moves about twice that.
    moved = 10 * state_bytes + (3 if decoder.gated else 2) * ffn_bytes
    moved += 6 * element * (decoder.queries + decoder.keys) * tokens / layout.tensor

    saved = _saved_bytes(decoder, tokens, norm_tokens, layout, precision, trained) if active else {}
    kept = sum(state_bytes if half in again else size for half, size in saved.items())
    if len(again) == 2:
        kept = state_bytes  # Both halves are recomputed together, from the block's input.
    # Backward begins with the down projection. It makes the gradients of its input and of its weight, and the latter is
    # not yet added to those of other micro-batches. The activation comes next: gradients of its output and inputs and a
    # temporary, while its saved output is gone, so two tensors more than were saved. In both cases the residual
    # stream's gradient and what was recomputed are held, too.
    weight_bytes = element * decoder.width * decoder.ffn / layout.tensor if trained else 0.0
    working = max(2 * ffn_bytes, ffn_bytes + weight_bytes) + 2 * state_bytes + sum(saved[half] for half in again)

    # Each half sums its output over the tensor ranks, and in backward its input's gradient. Sequence parallelism cuts
    # the sum in two, an all-gather before and a reduce-scatter behind the half; together they send as much. The
    # gathered input is kept, so that backward need not gather it again.
    collectives = 4 + len(again) if active else 2
    parameters = (decoder.matrices + decoder.split_vectors) // layout.tensor + decoder.whole_vectors
    return LayerCost(
        name="",
        parameters=parameters,
        trained_parameters=parameters if trained else 0,
        forward=forward + scores,
        backward=backward + scores * (2.0 if active else 0.0),
        recomputed=recomputed,
        moved_bytes=moved * ((3.0 if active else 1.0) + 0.5 * len(again)),
        saved_bytes=kept,
        table_bytes=2.0 * element * decoder.head_width * tokens,
        working_bytes=working if active else 3 * ffn_bytes + 2 * state_bytes,
        boundary_bytes=state_bytes,
        tensor_collectives=collectives if layout.tensor > 1 else 0,
        tensor_bytes=collectives * all_reduce_bytes(element * decoder.width * tokens, layout),
        context_bytes=_context_messages(decoder, element * tokens, layout, "attention" in again, active),
    )


def _saved_bytes(
    decoder: Decoder, tokens: float, norm_tokens: float, layout: Layout, precision: Precision, trained: bool
) -> dict[str, float]:
    """Bytes that each half of a block keeps from forward to backward."""
    element, split = precision.element, layout.tensor
    norm = norm_saved(decoder.width, precision, decoder.layer_norm) * norm_tokens
    column_input = element * decoder.width * tokens if trained else 0.0
    copies = {"attention": 3, "mlp": 2 if decoder.gated else 1} if precision.autocast else {"attention": 1, "mlp": 1}
    # Queries, keys, values, output and its log-sum-exps. The output is the last projection's input, too; with context
    # parallelism that input is another tensor, the one that came back from the exchange.
    attention = (element * 2 * (decoder.queries + decoder.keys) + 4 * decoder.heads) * tokens / split
    if layout.context > 1 and trained:
        attention += element * decoder.queries * tokens / split
    # The activation's inputs, and its output for the down projection's gradient.
    mlp = element * decoder.ffn * (decoder.activation_inputs + trained) * tokens / split
    weights = element / split if precision.casts_weights else 0.0
    return {
        "attention": norm + copies["attention"] * column_input + attention + weights * decoder.attention_matrices,
        "mlp": norm + copies["mlp"] * column_input + mlp + weights * decoder.mlp_matrices,
    }


def _context_messages(decoder: Decoder, token_bytes: float, layout: Layout, again: bool, active: bool) -> float:
    """Bytes that a rank sends to change q, k and v from a slice of the sequence to a slice of the heads, and the output
    back.

    A rank keeps its own c-th part of each.
    """
    exchanged = token_bytes / layout.tensor * 2 * (decoder.queries + decoder.keys)
    return (1 + (1 + again if active else 0)) * (layout.context - 1) / layout.context * exchanged
