"""Small real things that many tests need: a tokenizer, records with images, preprocessed files."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# Without a GPU, Triton's kernels are tested by its interpreter. It looks here when anything first imports it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# What takes minutes starts first and files of a second end the suite, so that processes that share it end together.
_LONG_FIRST = ("tests/distributed/", "tests/faults/", "tests/integration/", "tests/unit/kernels/", "tests/")

CONTROL_MARKS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]

_COLORS = ("red", "green", "blue", "yellow")
_SHAPES = ("circle", "square", "triangle")


def train_sentencepiece(folder: Path, name: str = "tiny", **options: Any) -> Path:
    """Train a sentencepiece model on a few sentences about shapes."""
    corpus = folder / f"{name}.txt"
    sentences = [
        f"USER: What color is the {shape}? ASSISTANT: The {shape} is {color}, and there are {n} of them."
        for shape in _SHAPES
        for color in _COLORS
        for n in range(20)
    ]
    corpus.write_text("\n".join(sentences), encoding="utf-8")
    settings: dict[str, Any] = {
        "vocab_size": 420,
        "model_type": "bpe",
        "byte_fallback": True,
        "control_symbols": CONTROL_MARKS,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / name), **{**settings, **options}
    )
    return folder / f"{name}.model"


def llama_folder(folder: Path, *, legacy: bool) -> Path:
    """A tokenizer folder of the Llama family, as downloads have it. `legacy` puts a space behind each special token."""
    folder.mkdir(parents=True)
    train_sentencepiece(
        folder, "tokenizer", normalization_rule_name="identity", remove_extra_whitespaces=False, control_symbols=[]
    )
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": legacy,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    return folder


def byte_level_folder(folder: Path, *, trim_offsets: bool = True) -> Path:
    """A byte-level BPE tokenizer folder, as Llama 3 and Qwen have it, with the control tokens of every template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", *CONTROL_MARKS],
        show_progress=False,
    )
    backend.train_from_iterator(["What color is it?", "It is red.", "The circle is blue."] * 5, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def pytest_configure(config: pytest.Config) -> None:
    """Keep pytest-xdist from ordering files by their number of tests."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the folders of tests."""
    items.sort(key=lambda item: next(i for i, folder in enumerate(_LONG_FIRST) if item.nodeid.startswith(folder)))


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    """What the package logs during the test, as `LEVEL message`."""
    lines: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(f"{record.levelname} {record.getMessage()}")

    package, collector = logging.getLogger("megatron_haplovl"), Collector()
    level = package.level
    package.addHandler(collector)
    package.setLevel(logging.INFO)
    yield lines
    package.removeHandler(collector)
    package.setLevel(level)


@pytest.fixture(scope="session")
def tiny_spm_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece BPE model of about 400 pieces that knows the control tokens of every chat template."""
    return train_sentencepiece(tmp_path_factory.mktemp("spm"))


@dataclass(frozen=True)
class LlavaDataset:
    """A file of records and its image folder."""

    json: Path
    image_folder: Path
    records: list[dict[str, Any]]


def write_image(path: Path, height: int, width: int, seed: int) -> None:
    """A PNG of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def make_llava_dataset(folder: Path, num_records: int = 24) -> LlavaDataset:
    """Records with one image, two images, a shared image, and none; some with two turns."""
    image_folder = folder / "images"
    sizes = [(32, 32), (20, 48), (50, 17), (40, 64), (8, 8)]
    for i, (height, width) in enumerate(sizes):
        write_image(image_folder / "a" / f"{i}.png", height, width, seed=i)
    records: list[dict[str, Any]] = []
    for i in range(num_records):
        images = [[f"a/{i % 5}.png"], [f"a/{i % 5}.png", f"a/{(i + 2) % 5}.png"], [], [f"a/{(i + 1) % 5}.png"]][i % 4]
        marks = "<image>\n" * len(images)
        turns = [
            {"from": "human", "value": f"{marks}What color is the {_SHAPES[i % 3]}?"},
            {"from": "gpt", "value": f"The {_SHAPES[i % 3]} is {_COLORS[i % 4]}." + " It is." * (i % 7)},
        ]
        if i % 5 == 0:
            turns += [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": str(i)}]
        record: dict[str, Any] = {"id": f"record-{i}", "conversations": turns}
        if images:
            record["image"] = images[0] if len(images) == 1 else images
        records.append(record)
    path = folder / "records.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return LlavaDataset(path, image_folder, records)


@pytest.fixture
def tiny_llava_dataset(tmp_path: Path) -> LlavaDataset:
    """Two dozen records with images, in a folder of the test's own."""
    return make_llava_dataset(tmp_path / "llava")


@pytest.fixture(scope="session")
def tiny_prefix(tmp_path_factory: pytest.TempPathFactory, tiny_spm_model: Path) -> str:
    """The same records preprocessed with the llama3 template; do not write to it."""
    from megatron_haplovl.data.preprocessing.prefix_writer import write_prefix
    from megatron_haplovl.data.preprocessing.processor import ProcessorSettings
    from megatron_haplovl.data.readers.inputs import read

    folder = tmp_path_factory.mktemp("prefix")
    dataset = make_llava_dataset(folder)
    settings = ProcessorSettings(str(tiny_spm_model), "llama3", (str(dataset.image_folder),))
    prefix = str(folder / "train")
    write_prefix(prefix, read([dataset.json]), settings)
    return prefix
