"""Samples per second of the loader, beside a plain Dataset over JSON, PIL and transformers' CLIP processor.

Both read the same records with the same number of worker processes, in the same run, in turns. The peer is what a
working first version does: it opens and resizes each image with transformers' image processor (any resolution: each
tile), tokenizes the conversation and pads the batch. The machine's own limit is stated, too: how fast one process
decodes the same images and does nothing else.

    python -m benchmarks.data_loading --samples 256 --workers 2
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPImageProcessor

from benchmarks.measure import machine, print_table, write_json
from megatron_haplovl.commands.preprocess import main as preprocess
from megatron_haplovl.config.presets import MODELS
from megatron_haplovl.config.schema import Config, DataConfig, ModelConfig, ScheduleConfig
from megatron_haplovl.data.image_geometry import fit_within, grid_pinpoints, select_best_resolution
from megatron_haplovl.data.loader import build_loader
from megatron_haplovl.data.tokenizer import TextTokenizer, load_tokenizer
from tests.conftest import train_sentencepiece

_BATCH = 8
_SEQ_LENGTH = {"pad": 2048, "anyres": 6144}


@dataclass(frozen=True)
class Records:
    """Made-up records, their images, and the same as preprocessed files."""

    json: Path
    images: Path
    prefix: str
    tokenizer: Path


def make_records(folder: Path, samples: int) -> Records:
    """Photographs' sizes, shapes and compression; answers of some dozen words."""
    random = np.random.default_rng(0)
    images = folder / "images"
    images.mkdir(parents=True)
    records = []
    for i in range(samples):
        height, width = [(427, 640), (480, 640), (640, 480), (375, 500)][i % 4]
        coarse = random.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        noisy = np.asarray(picture, dtype=np.int16) + random.integers(-12, 13, (height, width, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(images / f"{i}.jpg", quality=90)
        answer = " ".join(random.choice(["The", "circle", "is", "red", "blue", "and", "green"], size=60))
        turns = [
            {"from": "human", "value": "<image>\nWhat color is the circle?"},
            {"from": "gpt", "value": f"{answer}."},
        ]
        records.append({"id": i, "image": f"{i}.jpg", "conversations": turns})
    path = folder / "records.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    tokenizer = train_sentencepiece(folder)
    prefix = str(folder / "data")
    words = ["--input", path, "--image-folder", images, "--output-prefix", prefix, "--tokenizer-model", tokenizer]
    assert preprocess([*map(str, words), "--chat-template", "vicuna_v1", "--workers", "1"]) == 0
    return Records(path, images, prefix, tokenizer)


class PlainDataset(Dataset[dict[str, torch.Tensor]]):
    """One sample: the image through transformers' processor, the conversation through the tokenizer."""

    def __init__(self, records: Records, model: ModelConfig) -> None:
        self._records = json.loads(records.json.read_text(encoding="utf-8"))
        self._images, self._vision = records.images, model.vision
        self._tokenizer: TextTokenizer = load_tokenizer(records.tokenizer)
        side = model.vision.image_size
        self._processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        record = self._records[index]
        image = Image.open(self._images / record["image"]).convert("RGB")
        tiles = self._processor(images=self._tiles(image), return_tensors="pt")["pixel_values"]
        asked, answered = (turn["value"] for turn in record["conversations"])
        prompt, _ = self._tokenizer.encode(f"USER: {asked} ASSISTANT:")
        answer, _ = self._tokenizer.encode(f" {answered}</s>")
        ids = torch.tensor(prompt + answer)
        labels = torch.tensor([-100] * len(prompt) + answer)
        return {"input_ids": ids, "labels": labels, "pixel_values": tiles}

    def _tiles(self, image: Image.Image) -> list[Image.Image]:
        vision = self._vision
        if vision.image_aspect_ratio == "pad":
            side = max(image.size)
            square = Image.new("RGB", (side, side), (122, 116, 104))
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            return [square]
        height, width = select_best_resolution(image.height, image.width, grid_pinpoints(vision))
        new_height, new_width = fit_within(image.height, image.width, height, width)
        canvas = Image.new("RGB", (width, height))
        canvas.paste(image.resize((new_width, new_height)), ((width - new_width) // 2, (height - new_height) // 2))
        side = vision.image_size
        corners = [(x, y) for y in range(0, height, side) for x in range(0, width, side)]
        return [canvas.crop((x, y, x + side, y + side)) for x, y in corners]


def _pad(samples: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    def padded(name: str, value: int) -> torch.Tensor:
        rows = [sample[name] for sample in samples]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    pixels = torch.cat([sample["pixel_values"] for sample in samples])
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "pixel_values": pixels}


def plain_batches(records: Records, model: ModelConfig, workers: int) -> Callable[[], Iterator[object]]:
    """The peer's loader."""
    dataset = PlainDataset(records, model)
    loader = DataLoader(
        dataset, _BATCH, shuffle=True, num_workers=workers, collate_fn=_pad, persistent_workers=workers > 0
    )
    return lambda: iter(loader)


def our_batches(records: Records, model: ModelConfig, workers: int) -> Callable[[], Iterator[object]]:
    """This project's loader, one epoch."""
    seq_length = _SEQ_LENGTH[model.vision.image_aspect_ratio]
    config = Config(
        model=model,
        data=DataConfig(data_path=(records.prefix,), seq_length=seq_length, num_workers=workers),
        schedule=ScheduleConfig(global_batch_size=1, micro_batch_size=1),
    )
    loader = build_loader((records.prefix,), config, num_steps=1, dp_rank=0, dp_size=1)
    steps = loader.plan.epochs[0].num_packs
    loader = build_loader((records.prefix,), config, num_steps=steps, dp_rank=0, dp_size=1)
    return lambda: loader.micro_batches(0)


def seconds_of(batches: Callable[[], Iterator[object]]) -> float:
    """Time of one pass."""
    started = time.perf_counter()
    for _ in batches():
        pass
    return time.perf_counter() - started


def decode_seconds(records: Records) -> float:
    """Time in which one process decodes all images."""
    encoded = [path.read_bytes() for path in sorted(records.images.iterdir())]
    started = time.perf_counter()
    for data in encoded:
        Image.open(io.BytesIO(data)).convert("RGB")
    return time.perf_counter() - started


def measure(samples: int, workers: int, repeats: int) -> list[dict[str, Any]]:
    """Both loaders for a single tile and for any resolution."""
    results = []
    with tempfile.TemporaryDirectory() as name:
        records = make_records(Path(name), samples)
        decode = statistics.median(decode_seconds(records) for _ in range(repeats))
        for preset in ("haplovl-7b", "haplovl-8b"):
            model = MODELS[preset]
            ours, plain = our_batches(records, model, workers), plain_batches(records, model, workers)
            seconds_of(ours), seconds_of(plain)  # Workers start, files come into memory.
            pairs = [(seconds_of(ours), seconds_of(plain)) for _ in range(repeats)]
            our_seconds, plain_seconds = (statistics.median(column) for column in zip(*pairs, strict=True))
            results.append(
                {
                    "model": preset,
                    "workers": workers,
                    "ours, samples/s": samples / our_seconds,
                    "plain, samples/s": samples / plain_seconds,
                    "ratio": statistics.median(theirs / own for own, theirs in pairs),
                    "decode only, one process, samples/s": samples / decode,
                }
            )
    return results


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256, help="records")
    parser.add_argument("--workers", type=int, default=2, help="loading processes")
    parser.add_argument("--repeats", type=int, default=5, help="passes of each loader")
    parser.add_argument("--output", help="JSON file for the records")
    args = parser.parse_args()
    torch.set_num_threads(1)
    records = measure(args.samples, args.workers, args.repeats)
    print_table(records, list(records[0]))
    if args.output:
        write_json(args.output, records, **machine("cpu"))


if __name__ == "__main__":
    main()
