"""Weights of Hugging Face folders under our names: vision towers, language models, the released Haplo format."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import PretrainedConfig

from megatron_haplovl.checkpoint.weight_files import WeightReader, check_shape
from megatron_haplovl.config.allowed import STRICT, Allowed
from megatron_haplovl.config.schema import ModelConfig
from megatron_haplovl.config.stages import StageSpec
from megatron_haplovl.conversion.clip_mapping import CLIP
from megatron_haplovl.conversion.hf_compatibility import check_language_config, check_vision_config, read_hf_config
from megatron_haplovl.conversion.hf_mapping import Entry, VisionTower, haplo_table, language_model_table
from megatron_haplovl.conversion.siglip_mapping import SIGLIP

# What a folder may hold beside the tensors that are taken. Anything else is an error, because it would change outputs.
_ROTARY_BUFFERS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_ANYTHING = re.compile(".*")

VISION_TOWERS = (CLIP, SIGLIP)
"""The families that `--vision-teacher` takes."""


class MappedWeights:
    """The tensors of a foreign folder under our names, read when they are asked for. Every shape is checked first.

    Args:
        reader: the folder's tensors.
        table: what is taken from it. Whoever makes the table checks the constants.
        extra: foreign names that may be left over.
        allow: what may be missing or left over beside that.
        prefix: stands before the table's names in the folder.

    Raises:
        ValueError: a tensor is missing, has another shape, or is neither in the table nor in `extra`.
    """

    def __init__(
        self, reader: WeightReader, table: Iterable[Entry], extra: re.Pattern[str], allow: Allowed, prefix: str = ""
    ) -> None:
        self.folder = reader.folder
        self._reader = reader
        self._entries: dict[str, Entry] = {}
        self._prefix = prefix
        left = set(reader.names())
        for entry in table:
            if _may_be_missing(entry, reader, allow, prefix):
                continue
            for name, shape in ((entry.theirs, entry.their_shape), *entry.theirs_too):
                check_shape(reader, prefix + name, shape)
                left.discard(prefix + name)
            if entry.constant is None:
                (ours,) = entry.ours
                self._entries[ours] = entry
        if unknown := sorted(name for name in left if not (extra.fullmatch(name) or allow.skips(name))):
            raise ValueError(
                f"{self.folder}: tensors that the model has no place for: {', '.join(unknown[:5])} "
                f"({len(unknown)} in all); --allow-unexpected skips those that it names"
            )
        self.skipped = [(name, f"skipped: has no counterpart ({self.folder})") for name in sorted(left)]
        """Foreign names of the tensors that are not taken, each with the reason."""

    def names(self) -> list[str]:
        """Our names."""
        return list(self._entries)

    def origin(self, name: str) -> str:
        """The folder, and what is done to the tensor beside renaming and reshaping (mostly nothing)."""
        note = self._entries[name].note
        return f"{self.folder}, {note}" if note else str(self.folder)

    def get(self, name: str) -> torch.Tensor:
        """One tensor in our form, in the number format in which it is stored."""
        entry = self._entries[name]
        assert entry.to_ours is not None, entry
        theirs = (entry.theirs, *(further for further, _ in entry.theirs_too))
        return entry.to_ours(*(self._reader.get(self._prefix + name) for name in theirs))


def _may_be_missing(entry: Entry, reader: WeightReader, allow: Allowed, prefix: str = "") -> bool:
    return prefix + entry.theirs not in reader and entry.constant is None and all(map(allow.lacks, entry.ours))


def vision_tower_of(folder: str | Path) -> tuple[VisionTower, PretrainedConfig]:
    """The family that a Hugging Face folder belongs to, and the configuration of its vision half.

    Raises:
        ValueError: there is no such folder, or it holds no vision model of a family in VISION_TOWERS.
    """
    config = read_hf_config(folder)
    for tower in VISION_TOWERS:
        if config.model_type == tower.model_type:
            return tower, config.vision_config
        if config.model_type == f"{tower.model_type}_vision_model":
            return tower, config
    raise ValueError(
        f"{Path(folder) / 'config.json'}: model_type {config.model_type!r} is not a vision model that the pre-decoder "
        f"can inherit from ({' or '.join(tower.name for tower in VISION_TOWERS)})"
    )


def open_vision_tower(folder: str | Path, model: ModelConfig, allow: Allowed = STRICT) -> MappedWeights:
    """Patch and position embedding, pre_norm and pre-decoder from the folder of a vision transformer.

    The position embedding is interpolated if the folder's image size differs from the model's.

    Args:
        folder: a Hugging Face folder of one of VISION_TOWERS, with or without its text half.
        model: the sizes it must have.
        allow: what may be missing or left over, beside what these models are known to lack or hold.

    Raises:
        ValueError: the folder is not such a model, or one of its settings or shapes contradicts `model`.
    """
    tower, config = vision_tower_of(folder)
    check_vision_config(config, model, Path(folder) / "config.json")
    reader = WeightReader(folder)
    marker = "embeddings.patch_embedding.weight"
    prefixes = [name.removesuffix(marker) for name in reader.names() if name.endswith(marker)]
    if len(prefixes) != 1:
        raise ValueError(f"{folder}: expected one tensor *{marker} of a vision model, found {len(prefixes)}")
    table = tower.table(model, side=config.image_size // config.patch_size)
    return MappedWeights(reader, table, tower.extra, allow, prefixes[0])


def open_language_model(
    folder: str | Path, model: ModelConfig, allow: Allowed = STRICT, *, stage: StageSpec
) -> MappedWeights:
    """Text embedding, post-decoder, final norm and output head from a language model's folder, as a stage has them.

    Args:
        folder: a Hugging Face LlamaForCausalLM or Qwen2ForCausalLM. A tied output head is the embedding matrix.
        model: the sizes it must have.
        allow: what may be missing or left over, beside what these models are known to lack or hold.
        stage: the training's stage. Stage 1 takes the text embedding only, and looks at nothing else.

    Raises:
        ValueError: the folder is not such a model, or one of its settings or shapes contradicts `model`.
    """
    config = read_hf_config(folder)
    check_language_config(config, model, Path(folder) / "config.json", stage=stage)
    reader = WeightReader(folder)
    table = language_model_table(model, tied="lm_head.weight" not in reader and config.tie_word_embeddings)
    table = [entry for entry in table if entry.ours[0].partition(".")[0] in stage.layers]
    extra = _ROTARY_BUFFERS if "post_decoder" in stage.layers else _ANYTHING
    return MappedWeights(reader, table, extra, allow)


def open_haplo(
    folder: str | Path, model: ModelConfig, allow: Allowed = STRICT, *, rows: int
) -> tuple[MappedWeights, ModelConfig]:
    """Every tensor of a folder in the released Haplo format.

    Its blocks are gated and biased everywhere. A part is left out if its values make the block compute the same as the
    plain one. If training has moved a part in any block, the model keeps that part in all blocks.

    Args:
        folder: the released folder.
        model: the sizes it must have. Its text embedding must be `folded`.
        allow: what may be missing or left over.
        rows: rows of the folder's embedding and output head. Those beyond the vocabulary must be zero.

    Returns:
        The tensors, and `model` with the settings that the released weights need beyond it.

    Raises:
        ValueError: a tensor is missing or has another shape, there are unknown ones, or rows beyond the vocabulary are
            not zero.
    """
    assert model.text_embedding == "folded"
    reader = WeightReader(folder)
    for entry in haplo_table(model, rows=rows):
        if _may_be_missing(entry, reader, allow):
            continue
        check_shape(reader, entry.theirs, entry.their_shape)
        if entry.constant is not None and bool((reader.get(entry.theirs) != entry.constant).any()):
            assert entry.kept_by is not None
            section, name = entry.kept_by
            model = dataclasses.replace(
                model, **{section: dataclasses.replace(getattr(model, section), **{name: True})}
            )
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if rows > model.vocab_size and name in reader and bool(reader.get(name)[model.vocab_size :].any()):
            raise ValueError(
                f"{reader.folder}: {name} has trained rows beyond --vocab-size {model.vocab_size}; give --vocab-size "
                f"{rows}"
            )
    return MappedWeights(reader, haplo_table(model, rows=rows), _ROTARY_BUFFERS, allow), model
