"""Read LLaVA records for the teachers: tokens through the product's own template and tokenizer, images as its tiles."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data.image_processing import decode_image, image_to_tiles
from megatron_haplovl.data.layouts.normalise import NormaliseOptions, normalise
from megatron_haplovl.data.readers.inputs import read
from megatron_haplovl.data.records import Image, Record


@dataclass(frozen=True)
class CaptionedImage:
    """An image file and what it shows."""

    path: Path
    caption: str


def load_records(path: Path) -> list[Record]:
    """All records of a file.

    Raises:
        ValueError: a record that cannot be used.
    """
    return [normalise(raw, NormaliseOptions()).record for raw in read([path])]


def load_captions(path: Path, image_folder: Path) -> list[CaptionedImage]:
    """The last answer of every record with one image is taken as the image's caption."""
    captions = []
    for record in load_records(path):
        match record.media:
            case [Image(path=str(image))]:
                captions.append(CaptionedImage(image_folder / image, record.messages[-1].text))
    return captions


def load_tiles(path: Path, vision: VisionConfig) -> torch.Tensor:
    """The image's tiles, float32 `[T, 3, image_size, image_size]`, normalised."""
    return torch.from_numpy(image_to_tiles(decode_image(path.read_bytes()), vision))


def pad_tokens(sequences: Sequence[Sequence[int] | np.ndarray], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad on the right.

    Returns:
        (ids, mask), both int64 `[B, S]`; the mask is 1 at real tokens.
    """
    length = max(len(sequence) for sequence in sequences)
    ids_BS = torch.full((len(sequences), length), pad_id, dtype=torch.int64)
    mask_BS = torch.zeros((len(sequences), length), dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids_BS[row, : len(sequence)] = torch.as_tensor(np.asarray(sequence, dtype=np.int64))
        mask_BS[row, : len(sequence)] = 1
    return ids_BS, mask_BS


def endless_batches(count: int, batch_size: int, rng: random.Random) -> Iterator[list[int]]:
    """Batches of indices below `count`, in a new random order in every epoch; the last, smaller batch is left out."""
    if batch_size > count:
        raise ValueError(f"a batch of {batch_size} is larger than the {count} samples there are")
    while True:
        order = rng.sample(range(count), count)
        for first in range(0, count - batch_size + 1, batch_size):
            yield order[first : first + batch_size]
