"""Names and shapes of every tensor: the training model beside CLIP, Llama / Qwen2, and the released Haplo format.

One :class:`Entry` is one tensor (or, for the folded embedding, one product) in both forms; a table is a list of them,
and reading (`conversion.hf_sources`) and writing both walk the same table. Shapes are part of it, so that a wrong file
is found by name and not by its logits.

Shape legend:

    V  vocabulary       D  width of the pre-decoder       L  width of the post-decoder
    C  patches of a tile       K  side of a patch in pixels
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from megatron_haplovl.checkpoint.weight_files import TensorSource, check_shape
from megatron_haplovl.config.schema import ModelConfig
from megatron_haplovl.data.image_processing import CLIP_MEAN, CLIP_STD

Shape = tuple[int, ...]

_FOLDED_AT_ONCE = 8192  # words


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
    to_ours: Callable[..., torch.Tensor] | None = None
    """None if the foreign tensor does not determine ours."""
    to_theirs: Callable[..., torch.Tensor] | None = None
    """None if our tensors do not determine the foreign one."""
    constant: float | None = None
    """If every element has this value, the foreign model computes the same as ours, which lacks the part."""
    kept_by: tuple[str, str] | None = None
    """For a constant: section and field of the :class:`ModelConfig` setting that gives our model this part, too."""
    theirs_too: tuple[tuple[str, Shape], ...] = ()
    """Names and shapes of further foreign tensors, which `to_ours` gets after the first."""
    note: str = ""
    """What `to_ours` does to the values, if it does more than rename and reshape."""


def _direct(ours: str, theirs: str, shape: Shape) -> Entry:
    return Entry(theirs, shape, (ours,), (shape,), _same, _same)


def _constant(theirs: str, shape: Shape, value: float, kept_by: tuple[str, str]) -> Entry:
    return Entry(theirs, shape, (), (), None, None, value, kept_by)


@dataclass(frozen=True)
class VisionTower:
    """A family of vision transformers that a pre-decoder inherits from and that teach it in stage 1."""

    name: str
    model_type: str
    """Hugging Face's type of the model with a text half; that of the vision half alone ends in `_vision_model`."""
    model_class: type[PreTrainedModel]
    """The vision half in transformers."""
    mean: tuple[float, float, float]
    """Mean that the tower normalises its pixels with (red, green, blue); below it the standard deviation."""
    std: tuple[float, float, float]
    leading_positions: int
    """Positions in front of the patches, such as a class token; their features are dropped."""
    has_first_norm: bool
    """Whether a norm stands between the embedding and the blocks, as in the pre-decoder."""
    table: Callable[..., list[Entry]]
    """(model, side=patches along one side of the tower's image) -> the tensors that are taken; names relative to it."""
    extra: re.Pattern[str]
    """Names of the tensors that a folder may hold beside those that are taken."""

    def colour_change(self) -> list[tuple[float, float]]:
        """(scale, shift) of red, green and blue: our normalised pixel, times scale plus shift, is the tower's."""
        channels = zip(CLIP_MEAN, CLIP_STD, self.mean, self.std, strict=True)
        return [(our_std / std, (our_mean - mean) / std) for our_mean, our_std, mean, std in channels]


def vision_blocks(model: ModelConfig) -> list[Entry]:
    """The blocks of a vision tower; CLIP and SigLIP give them the same names."""
    d, ffn = model.pre.hidden_size, model.pre.ffn_hidden_size
    table: list[Entry] = []
    for n in range(model.pre.num_layers):
        ours, theirs = f"pre_decoder.{n}", f"encoder.layers.{n}"
        table += norm_entries(f"{ours}.attention_norm", f"{theirs}.layer_norm1", d)
        table += norm_entries(f"{ours}.mlp_norm", f"{theirs}.layer_norm2", d)
        for our_name, their_name in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out")):
            table += _linear(f"{ours}.attention.{our_name}_proj", f"{theirs}.self_attn.{their_name}_proj", d, d)
        table += _linear(f"{ours}.mlp.up_proj", f"{theirs}.mlp.fc1", ffn, d)
        table += _linear(f"{ours}.mlp.down_proj", f"{theirs}.mlp.fc2", d, ffn)
    return table


def language_model_table(model: ModelConfig, *, tied: bool) -> list[Entry]:
    """LlamaForCausalLM; with `post.qkv_bias`, Qwen2ForCausalLM.

    Args:
        model: sizes.
        tied: whether the embedding matrix is the output head as well.
    """
    post = model.post
    embedding = "model.embed_tokens.weight"
    table = [
        _direct("embedding.text.weight", embedding, (model.vocab_size, post.hidden_size)),
        *_post_norms_and_matrices(model, "model.layers.", 0),
        _direct("final_norm.weight", "model.norm.weight", (post.hidden_size,)),
        _direct("lm_head.weight", embedding if tied else "lm_head.weight", (model.vocab_size, post.hidden_size)),
    ]
    if post.qkv_bias:
        for n in range(post.num_layers):
            for name, rows in _qkv_rows(model):
                ours, theirs = f"post_decoder.{n}.attention.{name}", f"model.layers.{n}.self_attn.{name}"
                table.append(_direct(f"{ours}.bias", f"{theirs}.bias", (rows,)))
    return table


def haplo_table(model: ModelConfig, *, rows: int) -> list[Entry]:
    """The released Haplo format.

    Its blocks are biased and gated in both decoders; the parts that the model's blocks lack are constants here.

    Args:
        model: sizes.
        rows: rows of the embedding and of the output head: the vocabulary, plus zero rows up to the ids of the image
            and video marks if these lie beyond it.
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
        patch_entry("model.patch_embed.proj.weight", model),
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
    table += norm_entries("embedding.pre_norm", "model.pre_norm", d)
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
        table += norm_entries(f"{ours}.attention_norm", f"{theirs}.input_layernorm", d)
        table += norm_entries(f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm", d)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            table += _linear(f"{ours}.attention.{name}", f"{theirs}.self_attn.{name}", d, d)
        if model.pre.gated_mlp:
            table += _linear(f"{ours}.mlp.gate_proj", f"{theirs}.mlp.gate_proj", ffn, d)
            table += _linear(f"{ours}.mlp.up_proj", f"{theirs}.mlp.up_proj", ffn, d)
        else:
            # down(act(gate(x)) * up(x)) is CLIP's MLP when up(x) is 1: CLIP's first layer is the gate.
            kept_by = ("pre", "gated_mlp")
            table += _linear(f"{ours}.mlp.up_proj", f"{theirs}.mlp.gate_proj", ffn, d)
            table.append(_constant(f"{theirs}.mlp.up_proj.weight", (ffn, d), 0.0, kept_by))
            table.append(_constant(f"{theirs}.mlp.up_proj.bias", (ffn,), 1.0, kept_by))
        table += _linear(f"{ours}.mlp.down_proj", f"{theirs}.mlp.down_proj", d, ffn)
    return table


def _haplo_post_blocks(model: ModelConfig) -> list[Entry]:
    post = model.post
    table = _post_norms_and_matrices(model, "model.layers.", model.pre.num_layers)
    for n in range(post.num_layers):
        ours, theirs = f"post_decoder.{n}", f"model.layers.{model.pre.num_layers + n}"
        for name, rows in _qkv_rows(model):
            table.append(_bias(f"{ours}.attention.{name}", f"{theirs}.self_attn.{name}", rows, model, "qkv_bias"))
        for our_name, their_name, rows in (
            ("attention.o_proj", "self_attn.o_proj", post.hidden_size),
            ("mlp.gate_proj", "mlp.gate_proj", post.ffn_hidden_size),
            ("mlp.up_proj", "mlp.up_proj", post.ffn_hidden_size),
            ("mlp.down_proj", "mlp.down_proj", post.hidden_size),
        ):
            table.append(_bias(f"{ours}.{our_name}", f"{theirs}.{their_name}", rows, model, "linear_bias"))
    return table


def _bias(ours: str, theirs: str, rows: int, model: ModelConfig, setting: str) -> Entry:
    """A bias of the post-decoder; our model has it if the setting of this name is on."""
    if getattr(model.post, setting):
        return _direct(f"{ours}.bias", f"{theirs}.bias", (rows,))
    return _constant(f"{theirs}.bias", (rows,), 0.0, ("post", setting))


def _post_norms_and_matrices(model: ModelConfig, prefix: str, first_layer: int) -> list[Entry]:
    """The bias-free parts of a Llama block; Llama and Haplo give them the same names."""
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


def patch_entry(theirs: str, model: ModelConfig) -> Entry:
    """A convolution's weight in their form; in ours, its windows are flattened."""
    d, k = model.pre.hidden_size, model.vision.patch_size
    return Entry(
        theirs,
        (d, 3, k, k),
        ("embedding.patch.weight",),
        ((d, 3 * k * k),),
        lambda weight: weight.flatten(1),
        lambda weight: weight.unflatten(1, (3, k, k)),
    )


def norm_entries(ours: str, theirs: str, width: int) -> list[Entry]:
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
    return F.pad(weight, (0, 0, 0, rows)) if rows else weight


def fold_text_embedding(text_VL: torch.Tensor, projector_DL: torch.Tensor) -> torch.Tensor:
    """The one matrix `W P^T` [V, D] in fp32 that embeds a token as `projector(W[token])` does."""
    projector_LD = projector_DL.float().T
    folded_VD = torch.empty(text_VL.shape[0], projector_LD.shape[1])
    # In slices, so that memory never holds the vocabulary's whole matrix in fp32.
    for words, folded in zip(text_VL.split(_FOLDED_AT_ONCE), folded_VD.split(_FOLDED_AT_ONCE), strict=True):
        torch.mm(words.float(), projector_LD, out=folded)
    return folded_VD


def resize_note(old: int, new: int) -> str:
    """Says what :func:`resize_positions` changes; empty if it changes nothing."""
    return "" if old == new else f"interpolated (bicubic) from {old} x {old} to {new} x {new} cells"


def resize_positions(position_CD: torch.Tensor, side: int) -> torch.Tensor:
    """A learned position embedding for a square grid of another size, by bicubic interpolation in fp32.

    Args:
        position_CD: one row for each cell of a square grid, row-major.
        side: cells along one side of the new grid.

    Returns:
        [side^2, D] in the given number format; the tensor itself if the size is the same.
    """
    old = math.isqrt(position_CD.shape[0])
    if old == side:
        return position_CD
    grid_1DHW = position_CD.float().unflatten(0, (old, old)).permute(2, 0, 1)[None]
    resized_1DHW = F.interpolate(grid_1DHW, size=(side, side), mode="bicubic", align_corners=False)
    return resized_1DHW[0].permute(1, 2, 0).flatten(0, 1).to(position_CD.dtype)


def export_to_haplo(
    source: TensorSource, model: ModelConfig, *, rows: int | None = None, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of the released Haplo format, made from a stage-2 training checkpoint.

    Args:
        source: tensors under the training model's names.
        model: sizes of the model.
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
    if missing := sorted(set(expected) - set(source.names())):
        raise ValueError(
            f"there is no {missing[0]} ({len(missing)} tensors are missing); a checkpoint that stage 2 has saved has "
            "all of them"
        )
    for name, shape in expected.items():
        check_shape(source, name, shape)
    stored = source.get("final_norm.weight").dtype if dtype is None else dtype
    for entry in table:
        if entry.constant is not None:
            yield entry.theirs, torch.full(entry.their_shape, entry.constant, dtype=stored)
            continue
        assert entry.to_theirs is not None, entry
        parts = [source.get(name) for name in entry.ours]
        tensor = entry.to_theirs(*parts)
        assert tuple(tensor.shape) == entry.their_shape, (entry, tensor.shape)
        yield entry.theirs, tensor.to(parts[0].dtype if dtype is None else dtype)
