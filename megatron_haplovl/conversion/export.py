"""A training checkpoint as a folder in the released Haplo format."""

from __future__ import annotations

import json
import logging
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from megatron_haplovl.checkpoint.folders import resolve_checkpoint
from megatron_haplovl.checkpoint.manifest import MANIFEST, damaged_files
from megatron_haplovl.checkpoint.pieces import open_checkpoint
from megatron_haplovl.checkpoint.weight_files import write_weights
from megatron_haplovl.config.files import read_config, read_json
from megatron_haplovl.config.schema import Config, ModelConfig
from megatron_haplovl.conversion.hf_compatibility import ACTIVATIONS, rope_scaling_to_hf
from megatron_haplovl.conversion.hf_mapping import export_to_haplo, haplo_table
from megatron_haplovl.conversion.remote_code import MODEL_AUTO_MAP, write_remote_code
from megatron_haplovl.data.chat_template import TEMPLATE_NAMES, ChatTemplate, ConversationEncoder, load_chat_template
from megatron_haplovl.data.image_geometry import grid_pinpoints
from megatron_haplovl.data.manifest import read_manifest
from megatron_haplovl.data.mixture_sources import training_prefixes
from megatron_haplovl.data.records import Message, Record
from megatron_haplovl.data.tokenizer import IMAGE_MARK, VIDEO_MARK, TextTokenizer, load_tokenizer
from megatron_haplovl.data.tokenizer_fingerprint import blind_spot, same_tokenizer, shorten
from megatron_haplovl.hf.configuration_haplo import HaploConfig
from megatron_haplovl.hf.image_processing_haplo import HaploImageProcessor
from megatron_haplovl.hf.processing_haplo import HaploProcessor

logger = logging.getLogger(__name__)

PRE_NORM_EPSILON = 1e-5
"""Epsilon of the norm before the first block: torch's default, which the released format fixes."""


@dataclass(frozen=True)
class ExportSummary:
    """What was written."""

    checkpoint: Path
    folder: Path
    parameters: int
    bytes: int
    dtype: torch.dtype
    rows: int
    """Rows of the text embedding and the output head."""


def export_checkpoint(
    load: str | Path,
    save: str | Path,
    tokenizer: TextTokenizer,
    template: ChatTemplate,
    dtype: torch.dtype | None = None,
) -> ExportSummary:
    """Write a stage-2 training checkpoint in the released format.

    Args:
        load: a --save folder of a training run, or one global_stepN in it.
        save: the folder to write; files of an earlier export are replaced.
        tokenizer: the one the model was trained with.
        template: the chat template it was trained with.
        dtype: number format of the weights; default: each tensor's own in the checkpoint.

    Raises:
        ValueError: the folder holds anything but an earlier export, there is no checkpoint, the checkpoint is damaged
            or from stage 1, the format or the tokenizer cannot hold the model, or the written tokenizer would read
            texts differently.
    """
    checkpoint, folder = resolve_checkpoint(load), Path(save)
    if folder.is_dir() and any(folder.iterdir()) and not is_released(folder):
        raise ValueError(f"{folder} holds other files than an earlier export, which would be lost; give another folder")
    if (checkpoint / MANIFEST).is_file() and (damage := damaged_files(checkpoint)):
        raise ValueError(f"{checkpoint} is damaged: {'; '.join(damage)}")
    config = read_config(checkpoint)
    if "lm_head" not in config.stage.layers:
        raise ValueError(
            f"{checkpoint} is a stage-1 checkpoint: it has no post-decoder to export; train stage 2 from it "
            "(finetune_haplovl.py --pretrained-checkpoint) and export that"
        )
    encoder = ConversationEncoder(tokenizer, template)
    rows = embedding_rows(config.model, tokenizer)
    hf_config = haplo_config(
        config.model,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        rows=rows,
        max_position_embeddings=config.data.seq_length,
    )
    reader = open_checkpoint(checkpoint)
    hf_config.dtype = reader.get("final_norm.weight").dtype if dtype is None else dtype
    hf_config.architectures = ["HaploForConditionalGeneration"]
    hf_config.auto_map = MODEL_AUTO_MAP
    processor = haplo_processor(config.model, tokenizer, template)
    check_written_tokenizer(processor, tokenizer)
    # Weights first: a folder with a config.json is complete.
    written = write_weights(export_to_haplo(reader, config.model, rows=rows, dtype=dtype), folder)
    write_processor(processor, folder)
    generation_config(encoder, model=config.model, rows=rows).save_pretrained(folder)
    write_remote_code(folder)
    hf_config.save_pretrained(folder)
    parameters = sum(math.prod(entry.their_shape) for entry in haplo_table(config.model, rows=rows))
    return ExportSummary(checkpoint, folder, parameters, written, hf_config.dtype, rows)


def is_released(folder: str | Path) -> bool:
    """Whether a folder is in the released format, by its config.json."""
    config = Path(folder) / "config.json"
    return config.is_file() and read_json(config).get("model_type") == HaploConfig.model_type


def training_template(config: Config, tokenizer: TextTokenizer, flag: str = "--chat-template") -> ChatTemplate:
    """The chat template that a run's data was preprocessed with, read from the data's manifests.

    Args:
        config: the run's settings.
        tokenizer: checked against the manifests, too.
        flag: what names a template, for messages.

    Raises:
        ValueError: there are no manifests (mock data, or data that has moved); they name several templates, or one that
            does not come with the package or has changed since; or the data was made with another tokenizer.
    """
    manifests = {prefix: read_manifest(prefix) for prefix in training_prefixes(config)}
    for prefix, manifest in manifests.items():
        if not same_tokenizer(manifest.tokenizer_fingerprint, tokenizer.fingerprint):
            raise ValueError(
                f"{prefix}, which the model was trained on, was preprocessed with another tokenizer (fingerprint "
                f"{shorten(manifest.tokenizer_fingerprint)}) than this one ({shorten(tokenizer.fingerprint)})"
            )
        if (blind := blind_spot(manifest.tokenizer_fingerprint)) is not None:
            logger.warning(f"{prefix}: {blind}")
    names = sorted({manifest.chat_template for manifest in manifests.values()})
    if len(names) != 1:
        raise ValueError(f"the training data was made with {names or 'no'} chat templates; give {flag} NAME")
    if names[0] not in TEMPLATE_NAMES:
        raise ValueError(f"the training data was made with the chat template {names[0]!r}; give its {flag} FILE")
    template = load_chat_template(names[0])
    if not all(template.is_the_one_of(manifest.chat_template_sha256) for manifest in manifests.values()):
        raise ValueError(
            f"the chat template {names[0]!r} has changed since the training data was made with it; give {flag} FILE"
        )
    return template


def embedding_rows(model: ModelConfig, tokenizer: TextTokenizer) -> int:
    """Rows that the exported embedding needs: the vocabulary, and the marks if their ids lie beyond it.

    Raises:
        ValueError: the tokenizer has more tokens than the model.
    """
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model a vocabulary of {model.vocab_size}: it was "
            "trained with another tokenizer"
        )
    return max(model.vocab_size, *(token_id + 1 for token_id in tokenizer.placeholder_ids))


def haplo_config(
    model: ModelConfig, *, image_token_id: int, video_token_id: int, rows: int, max_position_embeddings: int
) -> HaploConfig:
    """The configuration of the released format for a model.

    Args:
        model: sizes.
        image_token_id: id of the image mark.
        video_token_id: id of the video mark.
        rows: rows of the exported embedding.
        max_position_embeddings: longest sequence that was trained.

    Raises:
        ValueError: the format cannot hold this model.
    """
    vision, pre, post = model.vision, model.pre, model.post
    if pre.layernorm_epsilon != PRE_NORM_EPSILON:
        raise ValueError(
            f"--pre-layernorm-epsilon {pre.layernorm_epsilon}: the Haplo format fixes the epsilon of the first norm "
            f"at {PRE_NORM_EPSILON}"
        )
    anyres = vision.image_aspect_ratio == "anyres"
    common: dict[str, Any] = {
        "vocab_size": rows,
        "max_position_embeddings": max_position_embeddings,
        "initializer_range": model.init_std,
        "patch_size": vision.patch_size,
        "default_image_size": vision.image_size,
        "image_aspect_ratio": f"anyres_max_{vision.max_tiles}" if anyres else vision.image_aspect_ratio,
        "image_grid_pinpoints": [list(pinpoint) for pinpoint in grid_pinpoints(vision)] if anyres else None,
        "image_newline": vision.image_newline,
        "image_token_budget": vision.image_token_budget,
        "image_attention": model.image_attention,
        "image_token_index": image_token_id,
        "video_token_index": video_token_id,
    }
    base_config = {
        **common,
        "hidden_size": post.hidden_size,
        "intermediate_size": post.ffn_hidden_size,
        "num_hidden_layers": post.num_layers,
        "num_attention_heads": post.num_attention_heads,
        "num_key_value_heads": post.num_key_value_heads,
        "hidden_act": "silu",
        "rms_norm_eps": post.norm_epsilon,
        "rope_theta": post.rope_theta,
        "rope_scaling": rope_scaling_to_hf(post.rope_scaling),
        "norm_mode": "rmsnorm",
        "attention_rope": False,
    }
    pre_config = {
        **common,
        "hidden_size": pre.hidden_size,
        "intermediate_size": pre.ffn_hidden_size,
        "num_hidden_layers": pre.num_layers,
        "num_attention_heads": pre.num_attention_heads,
        "num_key_value_heads": pre.num_attention_heads,
        "hidden_act": ACTIVATIONS[pre.activation],
        "rms_norm_eps": pre.layernorm_epsilon,
        "rope_theta": pre.rope_theta,
        "norm_mode": "layernorm",
        "attention_rope": True,
    }
    return HaploConfig(base_config=base_config, pre_config=pre_config)


def haplo_processor(model: ModelConfig, tokenizer: TextTokenizer, template: ChatTemplate) -> HaploProcessor:
    """The processor that prepares inputs as they were in training."""
    vision = model.vision
    anyres = vision.image_aspect_ratio == "anyres"
    image_processor = HaploImageProcessor(
        size={"height": vision.image_size, "width": vision.image_size},
        patch_size=vision.patch_size,
        image_aspect_ratio=f"anyres_max_{vision.max_tiles}" if anyres else vision.image_aspect_ratio,
        image_newline=vision.image_newline,
        image_token_budget=vision.image_token_budget,
    )
    return HaploProcessor(
        image_processor,
        tokenizer.hf,
        chat_template=template.source,
        image_token=IMAGE_MARK,
        video_token=VIDEO_MARK,
    )


def generation_config(encoder: ConversationEncoder, *, model: ModelConfig, rows: int) -> GenerationConfig:
    """How to generate: greedily, until the token that ends an answer in the chat template."""
    hf = encoder.tokenizer.hf
    sample = encoder.encode(Record((Message("user", ("a",)), Message("assistant", ("b",)))))
    end_of_answer = int(sample.token_ids[sample.loss_mask.astype(bool)][-1])
    ends = {end_of_answer} | ({hf.eos_token_id} if hf.eos_token_id is not None else set())
    # Zero rows of the output head would win wherever every real logit is negative.
    never = {*encoder.tokenizer.placeholder_ids, *range(model.vocab_size, rows)}
    return GenerationConfig(
        bos_token_id=hf.bos_token_id,
        eos_token_id=sorted(ends),
        pad_token_id=end_of_answer if hf.pad_token_id is None else hf.pad_token_id,
        suppress_tokens=sorted(never),
        do_sample=False,
    )


def write_processor(processor: HaploProcessor, folder: Path) -> None:
    """Write tokenizer, image processor and template, so that transformers 4 and 5 read them as they are here."""
    processor.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    # This class, which transformers 4 knows as well, takes tokenizer.json as it is. A class of a model's own builds the
    # tokenizer anew from settings that it may not have written: LlamaTokenizer forgets `legacy`.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    # Otherwise the tokenizer also gives token types, which transformers 4 would hand to the model.
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_written_tokenizer(processor: HaploProcessor, tokenizer: TextTokenizer) -> None:
    """Write the processor aside, load its tokenizer as a user of the export does, and compare.

    Raises:
        ValueError: the written tokenizer gives other ids than the one of the training.
    """
    with tempfile.TemporaryDirectory() as aside:
        write_processor(processor, Path(aside))
        written = load_tokenizer(aside)
    if written.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            "the exported folder's tokenizer would read texts differently (fingerprint "
            f"{shorten(written.fingerprint)}) than the tokenizer of the training did "
            f"({shorten(tokenizer.fingerprint)}); preprocess and train with a tokenizer folder whose tokenizer.json "
            "says all that it does, with the tokenizer_class PreTrainedTokenizerFast"
        )
