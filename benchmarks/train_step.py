"""One full optimizer step: samples per second, peak memory, and where the time goes.

    python benchmarks/train_step.py [--json PATH] [--no-baseline]

The workload: four samples of one 336 x 336 image (600 visual tokens, newlines included) and 60, 100, 150 and 200 text
tokens. Ours packs them into one sequence; the baseline (benchmarks/huggingface_baseline.py) pads them into four rows.
Forward, backward and AdamW; bf16 means bf16 weights with fp32 master weights and fp32 optimizer state.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.huggingface_baseline import HuggingFaceBaseline
from benchmarks.measure import machine, median_seconds, peak_mib, print_table, write_json
from megatron_haplovl.config.schema import ModelConfig, PostDecoderConfig, PreDecoderConfig
from megatron_haplovl.config.stages import FINETUNE
from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data.batch import IGNORE_INDEX, Batch
from megatron_haplovl.data.dataset import Document, collate
from megatron_haplovl.data.image_geometry import image_layout
from megatron_haplovl.losses.language_modeling import next_token_loss
from megatron_haplovl.model.haplovl import HaploVL
from megatron_haplovl.model.initialization import initialize_weights
from megatron_haplovl.training.flops import training_flops

TEXT_LENGTHS = (60, 100, 150, 200)
CONFIG = ModelConfig(
    vocab_size=32000,
    vision=VisionConfig(image_size=336, patch_size=14, image_aspect_ratio="resize", image_newline=True),
    pre=PreDecoderConfig(num_layers=6, hidden_size=512, ffn_hidden_size=2048, num_attention_heads=8),
    post=PostDecoderConfig(
        num_layers=6, hidden_size=768, ffn_hidden_size=2048, num_attention_heads=12, num_key_value_heads=4
    ),
)


def documents() -> list[Document]:
    """The four samples: an image, then text whose every token is trained."""
    random = np.random.default_rng(0)
    size = CONFIG.vision.image_size
    layout = image_layout(size, size, CONFIG.vision)
    image = layout.num_tokens
    made = []
    for length in TEXT_LENGTHS:
        total = image + length
        is_text = np.arange(total) >= image
        tokens = np.where(is_text, random.integers(0, CONFIG.vocab_size, total), 0)
        labels = np.append(np.where(is_text, tokens, IGNORE_INDEX)[1:], IGNORE_INDEX)
        made.append(
            Document(
                tokens=tokens,
                labels=labels,
                is_text=is_text,
                kv_end=np.where(is_text, np.arange(1, total + 1), image),
                patch_source=layout.patch_source(),
                patch_target=layout.patch_offsets(),
                newline_target=layout.newline_offsets(),
                tiles=[random.integers(0, 256, (1, 3, size, size), dtype=np.uint8)],
                source=np.zeros(total, dtype=np.int32),
            )
        )
    return made


class MasterWeights:
    """AdamW on fp32 copies of bf16 weights, as DeepSpeed's bf16 optimizer does it; plain AdamW in fp32."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = list(model.parameters())
        low = self.weights[0].dtype != torch.float32
        self.masters = [p.detach().float() for p in self.weights] if low else self.weights
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-5, fused=True)

    def step(self) -> None:
        """Update, and forget the gradients."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            if master is not weight and weight.grad is not None:
                master.grad = weight.grad.float()
                weight.grad = None
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for weight, master in zip(self.weights, self.masters, strict=True):
                if master is not weight:
                    weight.copy_(master)


class Clock:
    """Wall time by part of the step; a part's backward pass ends when the gradient of its input is computed."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._last = 0.0

    def start(self) -> None:
        """Time counts from here."""
        self._last = self._now()

    def lap(self, part: str) -> None:
        """Count the time since the last lap for this part."""
        now = self._now()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def on(self, model: HaploVL) -> Iterator[None]:
        """Lap at the borders of embedding, pre-decoder, post-decoder and head, forward and backward."""

        def border(before: str, after: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
                self.lap(f"{before} forward")
                output.register_hook(lambda _grad: self.lap(f"{after} backward"))

            return hook

        handles = [
            model.embedding.register_forward_hook(border("embedding", "pre-decoder")),
            model.pre_decoder[-1].register_forward_hook(border("pre-decoder", "connector and post-decoder")),
            model.final_norm.register_forward_hook(border("connector and post-decoder", "head and loss")),
        ]
        yield
        for handle in handles:
            handle.remove()


def ours(dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], None], Callable[[], dict[str, float]]]:
    """(one step, seconds by part of one step)."""
    model = HaploVL(CONFIG).to(device, dtype)
    initialize_weights(dict(model.named_parameters()), CONFIG.init_std, seed=0)
    optimizer = MasterWeights(model)
    made = documents()
    batch = collate([made], sum(len(d.tokens) for d in made), CONFIG.vision).to(device)
    trained = int((batch.labels_BS != IGNORE_INDEX).sum())

    def step() -> None:
        (next_token_loss_sum(model, batch) / trained).backward()
        optimizer.step()

    def by_part() -> dict[str, float]:
        clock = Clock(device)
        with clock.on(model):
            clock.start()
            loss = next_token_loss_sum(model, batch) / trained
            clock.lap("head and loss forward")
            loss.backward()
            clock.lap("embedding backward")
        optimizer.step()
        clock.lap("optimizer")
        return clock.seconds

    return step, by_part


def next_token_loss_sum(model: HaploVL, batch: Batch) -> torch.Tensor:
    """Sum of the loss over the trained tokens."""
    return model(batch, next_token_loss)["lm loss"]


def baseline(dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """One step of the straightforward implementation."""
    torch.manual_seed(0)
    model = HuggingFaceBaseline(CONFIG).to(device, dtype)
    optimizer = MasterWeights(model)
    made = documents()
    batch = collate([[d] for d in made], max(len(d.tokens) for d in made), CONFIG.vision).to(device)
    tiles = batch.pixels_TCHW().to(dtype)

    def step() -> None:
        model(tiles, batch).backward()
        optimizer.step()

    return step


def model_flops() -> float:
    """Operations in one step of ours."""
    made = documents()
    return training_flops(
        CONFIG,
        tokens=sum(len(d.tokens) for d in made),
        head_tokens=sum(TEXT_LENGTHS),
        visible_pairs=sum(int(d.kv_end.sum()) for d in made),
        stage=FINETUNE,
    )


def measure(name: str, dtype: torch.dtype, device: torch.device, repeats: int) -> dict[str, Any]:
    """One record. A first step has made the optimizer state, so the memory is that of a run under way."""
    parts: dict[str, float] = {}
    holder: list[Any] = []

    def build_and_step() -> None:
        step, *by_part = ours(dtype, device) if name == "ours" else (baseline(dtype, device),)
        holder.extend((step, by_part))
        step()
        step()

    peak = peak_mib(build_and_step, device)
    step, by_part = holder
    seconds = median_seconds(step, 0, repeats)
    if by_part:
        parts = {part: round(value, 4) for part, value in by_part[0]().items()}
    return {
        "implementation": name,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": seconds,
        "samples_per_second": len(TEXT_LENGTHS) / seconds,
        "tflops": model_flops() / seconds / 1e12,
        "peak_mib": peak,
        "seconds_by_part": parts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the records to this file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-baseline", action="store_true", help="leave the straightforward implementation out")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)

    records = []
    for name in ["ours"] if arguments.no_baseline else ["straightforward", "ours"]:
        for dtype in arguments.dtypes if name == "ours" else ["float32"]:
            records.append(measure(name, getattr(torch, dtype), device, arguments.repeats))
            if not arguments.no_baseline:
                records[-1]["times_faster"] = records[0]["seconds"] / records[-1]["seconds"]
                records[-1]["memory_ratio"] = records[-1]["peak_mib"] / records[0]["peak_mib"]
            print(f"{name}, {dtype}: {records[-1]['seconds']:.2f} s", flush=True)
    where = machine(device)
    print(f"\n{where}; {model_flops() / 1e12:.2f} TFLOP per step")
    columns = ["implementation", "dtype", "seconds", "samples_per_second", "tflops", "peak_mib"]
    print_table(records, [*columns, *([] if arguments.no_baseline else ["times_faster", "memory_ratio"])])
    for record in records:
        for part, seconds in record["seconds_by_part"].items():
            print(f"  {record['dtype']:>9}  {part:<36} {seconds:7.3f} s")
    if arguments.json:
        write_json(arguments.json, records, **where, flops=model_flops())


if __name__ == "__main__":
    main()
