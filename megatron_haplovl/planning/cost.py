"""What every layer of the flat list costs: arithmetic, parameters, memory kept for backward, messages.

Everything is arithmetic on sizes, so a laptop can estimate a layout of a thousand GPUs. What is kept for backward is
what our layers keep (`model/`, `kernels/elementwise.py`, `kernels/linear_cross_entropy.py`), tensor by tensor; the
tests count the same in a real model. Bytes and operations are those of one rank and one micro-batch.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace

from megatron_haplovl.config.layout import Layout
from megatron_haplovl.config.schema import ModelConfig
from megatron_haplovl.config.stages import PART_OF, StageSpec
from megatron_haplovl.kernels.linear_cross_entropy import BLOCK_BYTES, CHUNK_BYTES, MOST_ROUNDINGS
from megatron_haplovl.planning.cost_block import Decoder, block_cost, post_decoder_sizes, pre_decoder_sizes
from megatron_haplovl.planning.cost_units import (
    LayerCost,
    Operations,
    Precision,
    all_reduce_bytes,
    linear,
    norm_saved,
)
from megatron_haplovl.planning.work import Work

# fp32 tensors of a chunk's tokens x language width at the feature loss's worst moment: student, teacher, difference
# and five of autograd.
_FEATURE_COPIES = 8


def layer_costs(
    model: ModelConfig,
    work: Work,
    layout: Layout,
    precision: Precision,
    *,
    trained: Set[str],
    stage: StageSpec,
) -> list[LayerCost]:
    """The flat layer list with its costs.

    Args:
        model: sizes.
        work: one micro-batch, whole.
        layout: how ranks share the work; `data`, `pipeline` and `zero_stage` change nothing here.
        precision: number formats.
        trained: parts that are trained, as `training.recipe.trained_parts` names them.
        stage: the training's stage, which decides the layers. The vision teacher has the pre-decoder's sizes.
    """
    costs: list[LayerCost] = []

    def blocks(part: str, count: int, decoder: Decoder, trained: bool, path: bool) -> list[LayerCost]:
        first = block_cost(decoder, work, layout, precision, trained, path)
        later = block_cost(decoder, work, layout, precision, trained, trained or path)
        return [replace(first if i == 0 else later, name=f"{part}.{i}") for i in range(count)]

    for layer in stage.layers:
        trains = PART_OF[layer] in trained
        # Whether a gradient must pass: something before this layer trains.
        path = any(before.trained_parameters for before in costs)
        match layer:
            case "embedding":
                costs.append(
                    _embedding(model, work, layout, precision, trains, "embedding.text.weight" in stage.frozen)
                )
            case "pre_decoder":
                costs += blocks(layer, model.pre.num_layers, pre_decoder_sizes(model), trains, path)
            case "connector":
                costs.append(_connector(model, work, layout, precision, trains, path))
            case "post_decoder":
                costs += blocks(layer, model.post.num_layers, post_decoder_sizes(model), trains, path)
            case "final_norm":
                costs.append(_final_norm(model, work, layout, precision, trains, path))
            case "lm_head":
                costs.append(_head(model, work, layout, precision, trains, path))
            case "distillation":
                costs.append(_distillation(model, work, layout, precision, path))
            case _:
                raise ValueError(f"no cost is known of the layer {layer}")
    return costs


def model_operations(model: ModelConfig, work: Work, stage: StageSpec) -> float:
    """Operations of forward and backward when everything trains, as MFU counts them: three times those of the student's
    forward pass."""
    whole = layer_costs(model, work, Layout(), Precision(), trained=set(), stage=stage)
    teacher = _teacher(model, work).total if stage.has_teachers else 0.0
    return 3.0 * (sum(layer.forward.total for layer in whole) - teacher)


def _embedding(
    model: ModelConfig, work: Work, layout: Layout, precision: Precision, trained: bool, words_frozen: bool
) -> LayerCost:
    width, language, vision = model.pre.hidden_size, model.post.hidden_size, model.vision
    window = 3 * vision.patch_size**2
    # Every context rank embeds the whole sequence and goes on with its share.
    tokens, patches = work.tokens, work.patches
    element = precision.element
    factored = model.text_embedding == "factored"
    text_trained = trained and not words_frozen
    projector = language * width if factored else 0

    forward, backward = linear(projector / layout.tensor, tokens, trained, text_trained)
    patch_forward, patch_backward = linear(window * width, patches, trained, False)
    text = _text_parameters(model, layout)
    small = window * width + vision.cells_per_tile * width + (width if vision.image_newline else 0) + 2 * width
    # Pixels for the patch matrix; the patches that are copied in, and two int64 places for each of them.
    saved = norm_saved(width, precision, layer_norm=True) * tokens
    saved += ((window + width) * element + 16) * patches
    saved += element * (projector / layout.tensor + window * width) if precision.casts_weights else 0.0
    saved += (element * language * tokens if factored else 0.0) + (8 * tokens if text_trained else 0.0)  # Token ids.
    return LayerCost(
        name="embedding",
        parameters=text + projector // layout.tensor + small,
        trained_parameters=(projector // layout.tensor + small + (text if text_trained else 0)) if trained else 0,
        forward=forward + patch_forward,
        backward=backward + patch_backward,
        recomputed=Operations(),
        # A lookup's gradient is a whole matrix, filled with zeros first.
        moved_bytes=(3.0 if trained else 1.0) * element * (2 * language * factored + 8 * width) * tokens
        + (element * text if text_trained else 0.0),
        saved_bytes=saved if trained else 0.0,
        table_bytes=0.0,
        # The whole matrix's gradient is in memory before it is added to what was accumulated.
        working_bytes=4.0 * precision.residual * width * tokens + (element * text if text_trained else 0.0),
        boundary_bytes=_boundary(width, tokens / layout.context, layout, precision),
        # The words' sum over the ranks and its gradient; gathering the projector's outputs costs half of a sum.
        tensor_collectives=(1 + text_trained + factored) * (layout.tensor > 1),
        tensor_bytes=all_reduce_bytes(
            element * ((language * (1 + text_trained) + width / 2) if factored else width) * tokens, layout
        ),
        context_bytes=0.0,
    )


def _connector(
    model: ModelConfig, work: Work, layout: Layout, precision: Precision, trained: bool, path: bool
) -> LayerCost:
    width, language = model.pre.hidden_size, model.post.hidden_size
    tokens, element = work.tokens / layout.context, precision.element
    forward, backward = linear(width * language / layout.tensor, tokens, trained, path)
    parameters = width * language // layout.tensor
    return LayerCost(
        name="connector",
        parameters=parameters,
        trained_parameters=parameters if trained else 0,
        forward=forward,
        backward=backward,
        recomputed=Operations(),
        moved_bytes=0.0,
        saved_bytes=(element * width * tokens if trained else 0.0)
        + (element * parameters if precision.casts_weights and (trained or path) else 0.0),
        table_bytes=0.0,
        working_bytes=element * (width + language) * tokens + (element * width * language if trained else 0.0),
        boundary_bytes=_boundary(language, tokens, layout, precision),
        tensor_collectives=(1 + path) * (layout.tensor > 1),
        tensor_bytes=all_reduce_bytes(element * (language / 2 + width * path) * tokens, layout),
        context_bytes=0.0,
    )


def _final_norm(
    model: ModelConfig, work: Work, layout: Layout, precision: Precision, trained: bool, path: bool
) -> LayerCost:
    width = model.post.hidden_size
    tokens = work.tokens / layout.context / (layout.tensor if layout.sequence_parallel else 1)
    active = trained or path
    return LayerCost(
        name="final_norm",
        parameters=width,
        trained_parameters=width if trained else 0,
        forward=Operations(),
        backward=Operations(),
        recomputed=Operations(),
        moved_bytes=(6.0 if active else 2.0) * precision.residual * width * tokens,
        saved_bytes=norm_saved(width, precision, layer_norm=False) * tokens if active else 0.0,
        table_bytes=0.0,
        working_bytes=2.0 * precision.residual * width * tokens,
        boundary_bytes=precision.residual * width * tokens,
        tensor_collectives=0,
        tensor_bytes=0.0,
        context_bytes=0.0,
    )


def _head(model: ModelConfig, work: Work, layout: Layout, precision: Precision, trained: bool, path: bool) -> LayerCost:
    width, element = model.post.hidden_size, precision.element
    rows, tokens = work.head_tokens / layout.context, work.tokens / layout.context
    words = model.vocab_size // layout.tensor
    active = trained or path
    forward, backward = linear(words * width, rows, trained, active)
    return LayerCost(
        name="lm_head",
        parameters=words * width,
        trained_parameters=words * width if trained else 0,
        forward=forward,
        backward=backward,
        recomputed=Operations(),
        # Softmax reads and writes each chunk's logits a few times. Backward multiplies the head's gradient by a number.
        moved_bytes=6.0 * element * words * rows + (2.0 * element * words * width if trained else 0.0),
        # The chunked loss keeps the hidden states' gradient, and the selection of rows keeps which rows it took.
        saved_bytes=element * width * rows + tokens if active else 0.0,
        table_bytes=0.0,
        # Forward holds the hidden states and the rows that were taken; backward spreads the rows over the whole
        # sequence again. The head's gradient waits from forward to backward.
        working_bytes=max(
            _logits_bytes(words, rows, precision)
            + element * width * (tokens + rows)
            + (element * words * width if precision.casts_weights else 0.0),
            2 * element * width * tokens,
        )
        + (element * words * width if trained else 0.0),
        boundary_bytes=0.0,
        tensor_collectives=int(layout.tensor > 1 and active),
        tensor_bytes=all_reduce_bytes(element * width * rows, layout) if active else 0.0,
        context_bytes=0.0,
    )


def _distillation(model: ModelConfig, work: Work, layout: Layout, precision: Precision, path: bool) -> LayerCost:
    """Vision head, text head, temperature, both losses, and the teacher's forward pass.

    The teacher is the frozen CLIP vision transformer that the pre-decoder inherits from. Every tensor and context rank
    holds it whole and runs it on all tiles.
    """
    width, language, element = model.pre.hidden_size, model.post.hidden_size, precision.element
    patches, rows = work.patches / layout.context, work.head_tokens / layout.context
    words = model.vocab_size // layout.tensor
    vision_forward, vision_backward = linear(width * width / layout.tensor, patches, True, path)
    text_forward, text_backward = linear(width * language / layout.tensor, rows, True, path)
    logits_forward, logits_backward = linear(words * language, rows, False, True)
    teacher = _teacher(model, work)
    heads = (width * (width + 1) + (width + 1) * language) // layout.tensor + 1
    # The heads' inputs; the cosine's fp32 student and teacher with their norms; the fp32 student that the temperature
    # multiplies; the two gradients that the chunked loss has already made.
    visual_saved = (element * width + 2 * 4 * width + 8) * patches
    text_saved = (element * width + 4 * language + 2 * element * language) * rows
    return LayerCost(
        name="distillation",
        parameters=heads,
        trained_parameters=heads,
        forward=vision_forward + text_forward + logits_forward + teacher,
        backward=vision_backward + text_backward + logits_backward,
        recomputed=Operations(),
        moved_bytes=6.0 * element * words * rows
        + 3 * (8 * width * patches + 8 * language * rows) * element
        + _teacher_moved_bytes(model, work, precision),
        saved_bytes=visual_saved + text_saved,
        table_bytes=0.0,
        # Forward holds the hidden states and, for one chunk at a time, softmax or the feature loss and its gradient.
        # Backward spreads the gradients of patches and words over the whole sequence again.
        working_bytes=(element * words * language if precision.casts_weights else 0.0)
        + element * width * work.tokens / layout.context
        + max(
            _logits_bytes(words, rows, precision),
            (1.0 + _FEATURE_COPIES * 4 * language / (element * words)) * _chunk_bytes(words, rows, precision),
            element * width * work.tokens / layout.context,
        ),
        boundary_bytes=0.0,
        tensor_collectives=3 * (layout.tensor > 1),
        tensor_bytes=all_reduce_bytes(element * (width * patches + 2 * language * rows), layout),
        context_bytes=0.0,
        teacher_bytes=element * _teacher_parameters(model),
        copied_parameters=_text_parameters(model, layout),
    )


def _text_parameters(model: ModelConfig, layout: Layout) -> int:
    """This rank's part of the text embedding, without the projector."""
    width = model.post.hidden_size if model.text_embedding == "factored" else model.pre.hidden_size
    return model.vocab_size * width // layout.tensor


def _teacher_sizes(model: ModelConfig) -> Decoder:
    """A block of the teacher, which is plain even if the pre-decoder's blocks are not."""
    return pre_decoder_sizes(replace(model, pre=replace(model.pre, gated_mlp=False)))


def _teacher_parameters(model: ModelConfig) -> int:
    """CLIP's vision transformer: patches, positions, class token, the first norm, blocks."""
    decoder, width = _teacher_sizes(model), model.pre.hidden_size
    block = decoder.matrices + decoder.split_vectors + decoder.whole_vectors
    embedding = (3 * model.vision.patch_size**2 + model.vision.cells_per_tile + 2) * width
    return model.pre.num_layers * block + embedding + 2 * width


def _teacher(model: ModelConfig, work: Work) -> Operations:
    """The forward pass over whole tiles, each with a class token."""
    decoder, cells = _teacher_sizes(model), model.vision.cells_per_tile + 1
    tokens = cells * work.tiles
    patches = 2.0 * 3 * model.vision.patch_size**2 * decoder.width * tokens
    return Operations(
        products=model.pre.num_layers * 2.0 * decoder.matrices * tokens + patches,
        attention=model.pre.num_layers * 4.0 * decoder.queries * cells * tokens,
    )


def _teacher_moved_bytes(model: ModelConfig, work: Work, precision: Precision) -> float:
    """Forward's bytes, as in `cost_block.block_cost`; Transformers' quick-GELU makes three passes (2 + 2 + 3)."""
    decoder, tokens = _teacher_sizes(model), (model.vision.cells_per_tile + 1) * work.tiles
    return model.pre.num_layers * precision.element * (10 * decoder.width + 7 * decoder.ffn) * tokens


def _boundary(width: int, tokens: float, layout: Layout, precision: Precision) -> float:
    return precision.residual * width * tokens / (layout.tensor if layout.sequence_parallel else 1)


def _chunk_bytes(words: int, rows: float, precision: Precision) -> float:
    """The chunk of logits that the loss works on."""
    logits = precision.element * words * rows
    return max(min(logits, CHUNK_BYTES[precision.device]), logits / MOST_ROUNDINGS if precision.element < 4 else 0.0)


def _logits_bytes(words: int, rows: float, precision: Precision) -> float:
    """The chunk, and softmax's fp32 block: a copy of bf16 logits, and a temporary."""
    block = min(4 * words * rows, BLOCK_BYTES[precision.device])
    return _chunk_bytes(words, rows, precision) + (2 if precision.element < 4 else 1) * block
