"""Whether the training model and the exported model compute the same, on one fixed batch.

Each model is fed by its own path from text and images to tensors, so that the data path is compared as well.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megatron_haplovl.checkpoint.pieces import open_checkpoint
from megatron_haplovl.config.files import read_config
from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data.batch import Batch
from megatron_haplovl.data.dataset import collate, lay_out_document
from megatron_haplovl.data.sources import EncodedImage, Sample
from megatron_haplovl.data.tokenizer import IMAGE_MARK, TextTokenizer, load_tokenizer
from megatron_haplovl.hf.modeling_haplo import HaploForConditionalGeneration
from megatron_haplovl.hf.processing_haplo import HaploProcessor
from megatron_haplovl.model.haplovl import HaploVL


@dataclass(frozen=True)
class LogitDifference:
    """Result of :func:`compare_logits`."""

    largest_difference: float
    largest_logit: float
    tokens: int
    """Tokens compared."""


@torch.no_grad()
def compare_logits(
    checkpoint: str | Path, folder: str | Path, *, attn_implementation: str = "eager"
) -> LogitDifference:
    """Run both models in fp32 on three texts with no, one and two images.

    Args:
        checkpoint: a `global_stepN` folder of a training run.
        folder: the checkpoint's export.
        attn_implementation: the exported model's, "eager" or "sdpa".
    """
    config = read_config(checkpoint)
    tokenizer = load_tokenizer(folder)
    processor = HaploProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    texts, images = fixed_inputs(config.model.vision.image_size)
    inputs = processor(text=texts, images=images, padding_side="right")
    token_ids = [tokenizer.encode(text)[0] for text in texts]
    batch = training_batch(token_ids, images, tokenizer, config.model.vision)

    reader = open_checkpoint(checkpoint)
    # Built without memory, then filled: initialising billions of weights only to replace them takes minutes.
    with torch.device("meta"):
        ours = HaploVL(config.model, attention_backend="reference")
    ours.load_state_dict({name: reader.get(name).float() for name in reader.names()}, assign=True)
    theirs = HaploForConditionalGeneration.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation=attn_implementation,
        local_files_only=True,
        trust_remote_code=False,
    )
    real_BS = inputs["attention_mask"].bool()
    ours_MV = ours.eval().logits(batch)[real_BS]
    theirs_MV = theirs.eval()(**inputs).logits[real_BS][:, : config.model.vocab_size]
    return LogitDifference(float((ours_MV - theirs_MV).abs().max()), float(ours_MV.abs().max()), len(ours_MV))


def fixed_inputs(side: int) -> tuple[list[str], list[list[Image.Image]]]:
    """Texts and their images: none; a wide one; a tall and a small one.

    Args:
        side: side of a tile, in pixels.
    """
    rng = np.random.default_rng(0)

    def noise(height: int, width: int) -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))

    texts = [
        "What is two plus two?",
        f"{IMAGE_MARK}\nWhat is this?",
        f"First {IMAGE_MARK} and then {IMAGE_MARK}: which is larger?",
    ]
    images = [[], [noise(side, 2 * side + 3)], [noise(side + 5, side // 2), noise(side // 2, side // 2)]]
    return texts, images


def training_batch(
    token_ids: Sequence[Sequence[int]],
    images: Sequence[Sequence[Image.Image]],
    tokenizer: TextTokenizer,
    vision: VisionConfig,
) -> Batch:
    """The batch that training would make of these tokens: one document in each row, padding behind it."""
    documents = []
    for row_ids, row_images in zip(token_ids, images, strict=True):
        row_N = np.array(row_ids, dtype=np.int32)
        sample = Sample(
            token_ids=row_N,
            loss_mask=np.zeros(len(row_N), dtype=np.uint8),
            is_visual=row_N == tokenizer.image_token_id,
            visuals=tuple(EncodedImage(_png(image), image.height, image.width) for image in row_images),
        )
        documents.append(lay_out_document([sample], vision))
    length = max(len(document.tokens) for document in documents)
    return collate([[document] for document in documents], length, vision)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
