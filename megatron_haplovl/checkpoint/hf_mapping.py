"""Names and shapes of every tensor: the training model beside CLIP, Llama / Qwen2, and the released Haplo format.

One :class:`Entry` is one tensor (or, for the folded embedding, one product) in both forms; a table is a list of them,
and reading and writing both walk the same table. Shapes are part of it, so that a wrong file is found by name and not
by its logits.

Shape legend:

    V  vocabulary       D  width of the pre-decoder       L  width of the post-decoder
    C  patches of a tile       K  side of a patch in pixels
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_haplovl.checkpoint.hf_compatibility import check_language_config, check_vision_config, read_hf_config
from megatron_haplovl.checkpoint.weights import TensorSource, WeightReader
from megatron_haplovl.config.schema import ModelConfig

Shape = tuple[int, ...]


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass(frozen=True)
class Entry:
    """One tensor in the training model and in a foreign format."""

    theirs: str
    """Name in the foreign format."""
    their_shape: Shape
    ours: tuple[str, ...]
    """Names in the training model: one; several where `to_theirs` combines them; none for a constant."""
    our_shapes: tuple[Shape, ...]
    to_ours: Callable[[torch.Tensor], torch.Tensor] | None = None
    """None where the foreign tensor does not determine ours."""
    to_theirs: Callable[..., torch.Tensor] | None = None
    """None where our tensors do not determine the foreign one."""
    constant: float | None = None
    """The value of every element at which the foreign part does what ours does without it."""


def _direct(ours: str, theirs: str, shape: Shape) -> Entry:
    return Entry(theirs, shape, (ours,), (shape,), _same, _same)


def _constant(theirs: str, shape: Shape, value: float) -> Entry:
    return Entry(theirs, shape, (), (), None, None, value)


def clip_vision_table(model: ModelConfig) -> list[Entry]:
    """CLIP's vision tower, names relative to it. Its class token and post-LayerNorm have no counterpart."""
    d, ffn, cells = model.pre.hidden_size, model.pre.ffn_hidden_size, model.vision.cells_per_tile
    table = [
        _patch("embeddings.patch_embedding.weight", model),
        Entry(
            "embeddings.position_embedding.weight",
            (cells + 1, d),
            ("embedding.position",),
            ((cells, d),),
            lambda position: position[1:],  # row 0 belongs to the class token
        ),
        *_norm("embedding.pre_norm", "pre_layrnorm", d),
    ]
    for n in range(model.pre.num_layers):
        ours, theirs = f"pre_decoder.{n}", f"encoder.layers.{n}"
        table += _norm(f"{ours}.attention_norm", f"{theirs}.layer_norm1", d)
        table += _norm(f"{ours}.mlp_norm", f"{theirs}.layer_norm2", d)
        for our_name, their_name in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out")):
            table += _linear(f"{ours}.attention.{our_name}_proj", f"{theirs}.self_attn.{their_name}_proj", d, d)
        table += _linear(f"{ours}.mlp.up_proj", f"{theirs}.mlp.fc1", ffn, d)
        table += _linear(f"{ours}.mlp.down_proj", f"{theirs}.mlp.fc2", d, ffn)
    return table


def language_model_table(model: ModelConfig) -> list[Entry]:
    """LlamaForCausalLM; with `post.qkv_bias`, Qwen2ForCausalLM."""
    post = model.post
    table = [
        _direct("embedding.text.weight", "model.embed_tokens.weight", (model.vocab_size, post.hidden_size)),
        *_post_norms_and_matrices(model, "model.layers.", 0),
        _direct("final_norm.weight", "model.norm.weight", (post.hidden_size,)),
        _direct("lm_head.weight", "lm_head.weight", (model.vocab_size, post.hidden_size)),
    ]
    if post.qkv_bias:
        for n in range(post.num_layers):
            for name, rows in _qkv_rows(model):
                ours, theirs = f"post_decoder.{n}.attention.{name}", f"model.layers.{n}.self_attn.{name}"
                table.append(_direct(f"{ours}.bias", f"{theirs}.bias", (rows,)))
    return table


def haplo_table(model: ModelConfig, *, rows: int) -> list[Entry]:
    """The released Haplo format.

    Its blocks are biased and gated in both decoders; the parts that our plain blocks lack are constants here.

    Args:
        model: sizes.
        rows: rows of the embedding and of the output head: the vocabulary, plus zero rows up to the ids of the image
            and video marks where these lie beyond it.
    """
    d, post_width = model.pre.hidden_size, model.post.hidden_size
    padding = rows - model.vocab_size
    if model.text_embedding == "factored":
        embedding = Entry(
            "model.embed_tokens.weight",
            (rows, d),
            ("embedding.text.weight", "embedding.text_projector.weight"),
            ((model.vocab_size, post_width), (d, post_width)),
            None,
            lambda text, projector: _append_rows(fold_text_embedding(text, projector), padding),
        )
    else:
        embedding = _padded("embedding.text.weight", "model.embed_tokens.weight", (model.vocab_size, d), padding)
    table = [
        embedding,
        _patch("model.patch_embed.proj.weight", model),
        Entry(
            "model.pre_pos_embed",
            (1, model.vision.cells_per_tile, d),
            ("embedding.position",),
            ((model.vision.cells_per_tile, d),),
            lambda position: position[0],
            lambda position: position[None],
        ),
    ]
    if model.vision.image_newline:
        table.append(_direct("embedding.image_newline", "model.image_newline", (d,)))
    table += _norm("embedding.pre_norm", "model.pre_norm", d)
    table += _haplo_pre_blocks(model)
    table.append(_direct("connector.weight", "model.pre_connector.weight", (post_width, d)))
    table += _haplo_post_blocks(model)
    table.append(_direct("final_norm.weight", "model.norm.weight", (post_width,)))
    table.append(_padded("lm_head.weight", "lm_head.weight", (model.vocab_size, post_width), padding))
    return table


def _haplo_pre_blocks(model: ModelConfig) -> list[Entry]:
    d, ffn = model.pre.hidden_size, model.pre.ffn_hidden_size
    table: list[Entry] = []
    for n in range(model.pre.num_layers):
        ours, theirs = f"pre_decoder.{n}", f"model.layers.{n}"
        table += _norm(f"{ours}.attention_norm", f"{theirs}.input_layernorm", d)
        table += _norm(f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm", d)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            table += _linear(f"{ours}.attention.{name}", f"{theirs}.self_attn.{name}", d, d)
        # down(act(gate(x)) * up(x)) is CLIP's MLP when up(x) is 1: CLIP's first layer is the gate.
        table += _linear(f"{ours}.mlp.up_proj", f"{theirs}.mlp.gate_proj", ffn, d)
        table.append(_constant(f"{theirs}.mlp.up_proj.weight", (ffn, d), 0.0))
        table.append(_constant(f"{theirs}.mlp.up_proj.bias", (ffn,), 1.0))
        table += _linear(f"{ours}.mlp.down_proj", f"{theirs}.mlp.down_proj", d, ffn)
    return table


def _haplo_post_blocks(model: ModelConfig) -> list[Entry]:
    post = model.post
    table = _post_norms_and_matrices(model, "model.layers.", model.pre.num_layers)
    for n in range(post.num_layers):
        ours, theirs = f"post_decoder.{n}", f"model.layers.{model.pre.num_layers + n}"
        for name, rows in _qkv_rows(model):
            bias = f"{theirs}.self_attn.{name}.bias"
            if post.qkv_bias:
                table.append(_direct(f"{ours}.attention.{name}.bias", bias, (rows,)))
            else:
                table.append(_constant(bias, (rows,), 0.0))
        table.append(_constant(f"{theirs}.self_attn.o_proj.bias", (post.hidden_size,), 0.0))
        table.append(_constant(f"{theirs}.mlp.gate_proj.bias", (post.ffn_hidden_size,), 0.0))
        table.append(_constant(f"{theirs}.mlp.up_proj.bias", (post.ffn_hidden_size,), 0.0))
        table.append(_constant(f"{theirs}.mlp.down_proj.bias", (post.hidden_size,), 0.0))
    return table


def _post_norms_and_matrices(model: ModelConfig, prefix: str, first_layer: int) -> list[Entry]:
    """The bias-free parts of a Llama block, which Llama and Haplo name alike."""
    width, ffn = model.post.hidden_size, model.post.ffn_hidden_size
    table: list[Entry] = []
    for n in range(model.post.num_layers):
        ours, theirs = f"post_decoder.{n}", f"{prefix}{first_layer + n}"
        table.append(_direct(f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight", (width,)))
        table.append(_direct(f"{ours}.mlp_norm.weight", f"{theirs}.post_attention_layernorm.weight", (width,)))
        for name, rows in _qkv_rows(model):
            table.append(_direct(f"{ours}.attention.{name}.weight", f"{theirs}.self_attn.{name}.weight", (rows, width)))
        table.append(_direct(f"{ours}.attention.o_proj.weight", f"{theirs}.self_attn.o_proj.weight", (width, width)))
        for name in ("gate_proj", "up_proj"):
            table.append(_direct(f"{ours}.mlp.{name}.weight", f"{theirs}.mlp.{name}.weight", (ffn, width)))
        table.append(_direct(f"{ours}.mlp.down_proj.weight", f"{theirs}.mlp.down_proj.weight", (width, ffn)))
    return table


def _qkv_rows(model: ModelConfig) -> tuple[tuple[str, int], ...]:
    post = model.post
    kv_rows = post.hidden_size // post.num_attention_heads * post.num_key_value_heads
    return ("q_proj", post.hidden_size), ("k_proj", kv_rows), ("v_proj", kv_rows)


def _patch(theirs: str, model: ModelConfig) -> Entry:
    """A convolution's weight, and the same windows flattened."""
    d, k = model.pre.hidden_size, model.vision.patch_size
    return Entry(
        theirs,
        (d, 3, k, k),
        ("embedding.patch.weight",),
        ((d, 3 * k * k),),
        lambda weight: weight.flatten(1),
        lambda weight: weight.unflatten(1, (3, k, k)),
    )


def _norm(ours: str, theirs: str, width: int) -> list[Entry]:
    return [_direct(f"{ours}.{part}", f"{theirs}.{part}", (width,)) for part in ("weight", "bias")]


def _linear(ours: str, theirs: str, rows: int, columns: int) -> list[Entry]:
    return [
        _direct(f"{ours}.weight", f"{theirs}.weight", (rows, columns)),
        _direct(f"{ours}.bias", f"{theirs}.bias", (rows,)),
    ]


def _padded(ours: str, theirs: str, shape: tuple[int, int], padding: int) -> Entry:
    return Entry(
        theirs,
        (shape[0] + padding, shape[1]),
        (ours,),
        (shape,),
        lambda weight: weight[: shape[0]],
        lambda weight: _append_rows(weight, padding),
    )


def _append_rows(weight: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.nn.functional.pad(weight, (0, 0, 0, rows))


def fold_text_embedding(text_VL: torch.Tensor, projector_DL: torch.Tensor) -> torch.Tensor:
    """The one matrix `W P^T` [V, D] in fp32, that embeds a token as `projector(W[token])` does."""
    return text_VL.float() @ projector_DL.float().T


def load_vision_model(
    folder: str | Path, model: ModelConfig, *, only: Container[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Initial weights of patch and position embedding, pre_norm and pre-decoder from a CLIP folder.

    Args:
        folder: a Hugging Face CLIPVisionModel or CLIPModel.
        model: the sizes it must have.
        only: our names of the tensors to read; default all.

    Returns:
        (our name, tensor in the stored number format), read one at a time.

    Raises:
        ValueError: the folder is not such a model, or one of its settings or shapes contradicts `model`.
    """
    check_vision_config(read_hf_config(folder), model, Path(folder) / "config.json")
    reader = WeightReader(folder)
    marker = "embeddings.patch_embedding.weight"
    prefixes = [name.removesuffix(marker) for name in reader.names() if name.endswith(marker)]
    if len(prefixes) != 1:
        raise ValueError(f"{folder}: expected one tensor *{marker} of a CLIP vision model, found {len(prefixes)}")
    return _read(reader, clip_vision_table(model), prefixes[0], only)


def load_language_model(
    folder: str | Path, model: ModelConfig, *, embedding_only: bool, only: Container[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Initial weights of the text embedding and, in stage 2, of the post-decoder from a language model's folder.

    Args:
        folder: a Hugging Face LlamaForCausalLM or Qwen2ForCausalLM.
        model: the sizes it must have.
        embedding_only: read `embedding.text.weight` only (stage 1).
        only: our names of the tensors to read; default all.

    Returns:
        (our name, tensor in the stored number format), read one at a time. A tied output head comes as the embedding
        matrix, behind it.

    Raises:
        ValueError: the folder is not such a model, or one of its settings or shapes contradicts `model`.
    """
    config = read_hf_config(folder)
    check_language_config(config, model, Path(folder) / "config.json", embedding_only=embedding_only)
    reader = WeightReader(folder)
    table = language_model_table(model)
    if embedding_only:
        table = [entry for entry in table if entry.ours == ("embedding.text.weight",)]
    tied = "lm_head.weight" not in reader and config.tie_word_embeddings
    if not tied or embedding_only:
        return _read(reader, table, "", only)
    table = [entry for entry in table if entry.theirs != "lm_head.weight"]
    if only is not None and "lm_head.weight" in only:
        only = {name for entry in table for name in entry.ours if name in only} | {"embedding.text.weight"}
    return _with_tied_head(_read(reader, table, "", only))


def _with_tied_head(weights: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights:
        yield name, tensor
        if name == "embedding.text.weight":
            yield "lm_head.weight", tensor


def _read(
    reader: WeightReader, table: list[Entry], prefix: str, only: Container[str] | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a table, one at a time; every shape is checked before the first is read."""
    for entry in table:
        assert entry.to_ours is not None and len(entry.ours) == 1, entry
        _check_shape(reader, prefix + entry.theirs, entry.their_shape)
    wanted = (entry for entry in table if only is None or entry.ours[0] in only)
    # `to_ours` is there: asserted above.
    return ((entry.ours[0], entry.to_ours(reader.get(prefix + entry.theirs))) for entry in wanted if entry.to_ours)


def _check_shape(source: TensorSource, name: str, expected: Shape) -> None:
    shape = tuple(source.shape(name))
    if shape != expected:
        where = f"{source.folder}: " if isinstance(source, WeightReader) else ""
        raise ValueError(f"{where}{name} has the shape {list(shape)}, but the model needs {list(expected)}")


def export_to_haplo(
    source: TensorSource, model: ModelConfig, *, rows: int | None = None, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of the released Haplo format, made from a stage-2 training checkpoint.

    Args:
        source: tensors under the training model's names.
        model: its sizes.
        rows: see :func:`haplo_table`; default `model.vocab_size`.
        dtype: number format of the result; default that of each source tensor.

    Raises:
        ValueError: a tensor is missing or has another shape, or there are tensors that the format cannot hold.
    """
    table = haplo_table(model, rows=model.vocab_size if rows is None else rows)
    expected = {name: shape for entry in table for name, shape in zip(entry.ours, entry.our_shapes, strict=True)}
    if any(name.startswith("distillation.") for name in source.names()):
        raise ValueError(
            "this is a stage-1 checkpoint: it has no post-decoder to export; train stage 2 from it "
            "(finetune_haplovl.py --pretrained-checkpoint) and export that"
        )
    if unknown := sorted(set(source.names()) - set(expected)):
        raise ValueError(f"tensors that the Haplo format cannot hold: {', '.join(unknown[:5])} ({len(unknown)} in all)")
    for name, shape in expected.items():
        _check_shape(source, name, shape)
    stored = source.get("final_norm.weight").dtype if dtype is None else dtype
    for entry in table:
        if entry.constant is not None:
            yield entry.theirs, torch.full(entry.their_shape, entry.constant, dtype=stored)
            continue
        assert entry.to_theirs is not None, entry
        tensor = entry.to_theirs(*(source.get(name) for name in entry.ours))
        assert tuple(tensor.shape) == entry.their_shape, (entry, tensor.shape)
        yield entry.theirs, tensor.to(stored)
