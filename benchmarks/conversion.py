"""Conversion at true sizes: time, rate and peak memory, beside the library's own loading and saving.

    python benchmarks/conversion.py --model haplovl-8b --folder /scratch/conversion
    python benchmarks/conversion.py --model haplovl-8b --layers 4 --json benchmarks/results/conversion.json

Writes bf16 folders of CLIP's and the language model's true shapes, filled with one random block over and over, and
converts them: Hugging Face -> training checkpoint -> released Haplo format -> training checkpoint. Beside it, the
language model goes through transformers' `from_pretrained` and `save_pretrained`, if it fits into memory. Every step
begins with its input out of the page cache and ends with its output on the disk. The disk's own rate is that of a
plain copy of the same files, made before and after each step, because the rate changes.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import MIB, machine, peak_mib, print_table, write_json
from megatron_haplovl.checkpoint.weight_files import WeightReader, write_weights
from megatron_haplovl.config.presets import MODELS
from megatron_haplovl.config.schema import Config, ModelConfig
from megatron_haplovl.config.stages import FINETUNE
from megatron_haplovl.conversion.clip_mapping import clip_vision_table
from megatron_haplovl.conversion.hf_compatibility import language_config_of, vision_config_of
from megatron_haplovl.conversion.hf_mapping import Entry, export_to_haplo, language_model_table
from megatron_haplovl.conversion.hf_sources import open_haplo, open_language_model, open_vision_tower
from megatron_haplovl.conversion.initial_checkpoint import write_initial_checkpoint

_BLOCK = 64 * MIB
_COLUMNS = ("step", "seconds", "GB", "MB/s", "MB/s of copying", "of copying", "peak MiB")


def main() -> None:
    """Convert, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="haplovl-8b", help="preset (default: haplovl-8b)")
    parser.add_argument("--layers", type=int, metavar="N", help="blocks of each decoder (default: the preset's)")
    parser.add_argument(
        "--folder", default="conversion-benchmark", metavar="PATH", help="new folder, on the disk to measure"
    )
    parser.add_argument("--json", metavar="PATH", help="write the records to this file")
    arguments = parser.parse_args()
    model = MODELS[arguments.model]
    if arguments.layers is not None:
        model = dataclasses.replace(
            model,
            pre=dataclasses.replace(model.pre, num_layers=arguments.layers),
            post=dataclasses.replace(model.post, num_layers=arguments.layers),
        )
    folder = Path(arguments.folder)
    folder.mkdir(parents=True)
    try:
        records = measure(model, folder)
    finally:
        shutil.rmtree(folder)
    print_table(records, _COLUMNS)
    if arguments.json:
        write_json(arguments.json, records, model=arguments.model, layers=arguments.layers, **machine("cpu"))


def measure(model: ModelConfig, folder: Path) -> list[dict[str, Any]]:
    """One record for each step.

    Raises:
        ValueError: the disk has no room.
    """
    vision = clip_vision_table(model, side=model.vision.cells_per_side)
    language = language_model_table(model, tied=False)
    size = 2 * sum(_elements(entry) for entry in (*vision, *language))
    # A folder is removed once the last step that reads it is done; a step's input, its result
    # and a copy of the input are on the disk together.
    if shutil.disk_usage(folder).free < 3.1 * size:
        raise ValueError(f"{folder}: needs {3.1 * size / 1e9:.0f} GB of free disk; give fewer --layers")
    write_weights(_fake(vision), folder / "clip")
    vision_config_of(model).save_pretrained(folder / "clip")
    write_weights(_fake(language), folder / "language")
    kind = "Qwen2ForCausalLM" if model.post.qkv_bias else "LlamaForCausalLM"
    language_config_of(model, architectures=[kind]).save_pretrained(folder / "language")
    largest = 2 * max(_elements(entry) for entry in (*vision, *language))
    print(f"{size / 1e9:.2f} GB of weights, the largest tensor {largest / MIB:.0f} MiB", flush=True)

    def import_folders() -> None:
        sources = [
            open_vision_tower(folder / "clip", model),
            open_language_model(folder / "language", model, stage=FINETUNE),
        ]
        write_initial_checkpoint(sources, Config(model=model), folder / "training")

    def export() -> None:
        write_weights(export_to_haplo(WeightReader(folder / "whole"), model), folder / "haplo")

    def import_haplo() -> None:
        folded = dataclasses.replace(model, text_embedding="folded")
        source, found = open_haplo(folder / "haplo", folded, rows=model.vocab_size)
        write_initial_checkpoint([source], Config(model=found), folder / "again")

    def through_the_library() -> None:
        network = AutoModelForCausalLM.from_pretrained(
            folder / "language", dtype=torch.bfloat16, local_files_only=True, trust_remote_code=False
        )
        network.save_pretrained(folder / "library")
        _to_disk(folder / "library")

    folders = [folder / "clip", folder / "language"]
    records = [_step("Hugging Face -> training", import_folders, folders, folder / "training")]
    if _available_bytes() > 1.2 * _bytes(folder / "language"):
        name = "language model through transformers"
        records.append(_step(name, through_the_library, [folder / "language"], folder / "library"))
        shutil.rmtree(folder / "library")
    else:
        print("the language model does not fit into memory, so transformers cannot convert it here")
    for source in folders:
        shutil.rmtree(source)
    _complete(folder / "training" / "global_step0", folder / "whole", model)
    records.append(_step("training -> Haplo", export, [folder / "whole"], folder / "haplo"))
    shutil.rmtree(folder / "whole")
    records.append(_step("Haplo -> training", import_haplo, [folder / "haplo"], folder / "again"))
    return records


def _step(name: str, convert: Callable[[], None], sources: list[Path], target: Path) -> dict[str, Any]:
    before = _copying_rate(sources, target.parent / "copy")
    for source in sources:
        _forget(source)
    started = time.perf_counter()
    peak = peak_mib(convert, "cpu")
    seconds = time.perf_counter() - started
    written = _bytes(target) / 1e9
    rate = 1e3 * written / seconds
    copying = (before + _copying_rate(sources, target.parent / "copy")) / 2
    disk = {"MB/s of copying": copying, "of copying": f"{100 * rate / copying:.0f} %"}
    return {"step": name, "seconds": seconds, "GB": written, "MB/s": rate, **disk, "peak MiB": peak}


def _complete(checkpoint: Path, folder: Path, model: ModelConfig) -> None:
    """The imported checkpoint with what a run would add to it."""
    d, width = model.pre.hidden_size, model.post.hidden_size
    reader = WeightReader(checkpoint)
    added: dict[str, tuple[int, ...]] = {"embedding.text_projector.weight": (d, width), "connector.weight": (width, d)}
    added |= {"embedding.image_newline": (d,)} if model.vision.image_newline else {}

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield from ((name, reader.get(name)) for name in reader.names())
        yield from ((name, torch.full(shape, 0.01, dtype=torch.bfloat16)) for name, shape in added.items())

    write_weights(tensors(), folder)
    shutil.rmtree(checkpoint.parent)


def _fake(table: list[Entry]) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    block = (0.02 * torch.randn(2**20, generator=generator)).bfloat16()
    for entry in table:
        count = _elements(entry)
        yield entry.theirs, block.repeat(-(-count // len(block)))[:count].view(entry.their_shape)


def _elements(entry: Entry) -> int:
    return torch.Size(entry.their_shape).numel()


def _copying_rate(sources: list[Path], copy: Path) -> float:
    """MB/s of copying files one after the other to one file, which is removed again."""
    for source in sources:
        _forget(source)
    started = time.perf_counter()
    with copy.open("wb", buffering=0) as target:
        for path in (file for source in sources for file in _files(source)):
            with path.open("rb", buffering=0) as file:
                while content := file.read(_BLOCK):
                    target.write(content)
        os.fsync(target.fileno())
    seconds = time.perf_counter() - started
    copied = copy.stat().st_size
    copy.unlink()
    return copied / 1e6 / seconds


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in _files(path))


def _forget(path: Path) -> None:
    """Drop files from the page cache, so that they are read from the disk."""
    for file in _files(path):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _to_disk(path: Path) -> None:
    for file in _files(path):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def _available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])


if __name__ == "__main__":
    main()
