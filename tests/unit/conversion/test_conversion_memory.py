"""Conversion holds a few tensors at a time, whatever the model's size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.measure import MIB, peak_mib
from megatron_haplovl.checkpoint.pieces import MOMENTS, WEIGHT, Piece
from megatron_haplovl.checkpoint.weight_files import WeightReader, write_weights
from megatron_haplovl.checkpoint.write import complete, write_rank
from megatron_haplovl.config.schema import Config, DataConfig, ModelConfig, PostDecoderConfig, PreDecoderConfig
from megatron_haplovl.config.stages import FINETUNE
from megatron_haplovl.conversion.export import export_checkpoint
from megatron_haplovl.conversion.hf_compatibility import language_config_of
from megatron_haplovl.conversion.hf_mapping import language_model_table
from megatron_haplovl.conversion.hf_sources import open_language_model
from megatron_haplovl.conversion.initial_checkpoint import write_initial_checkpoint
from megatron_haplovl.conversion.released import open_released
from megatron_haplovl.data.chat_template import load_chat_template
from megatron_haplovl.data.tokenizer import load_tokenizer
from tests.fixtures.tiny_haplo import random_haplovl, save_training_checkpoint, train_tokenizer

_POST = PostDecoderConfig(
    num_layers=16, hidden_size=256, ffn_hidden_size=512, num_attention_heads=4, num_key_value_heads=4
)
_PRE = PreDecoderConfig(num_layers=16, hidden_size=256, ffn_hidden_size=512, num_attention_heads=4)
_MODEL = ModelConfig(vocab_size=64, pre=_PRE, post=_POST)
_LARGEST = 4 * 256 * 512 / MIB
# Measured: 1.3 to 6.3 MiB (the tokenizer is part of an export), of 72 MiB of weights.
_ALLOWED = 20 * _LARGEST


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, a training checkpoint and its export."""
    folder = tmp_path_factory.mktemp("large")
    names = {entry.theirs: entry.their_shape for entry in language_model_table(_MODEL, tied=False)}
    write_weights(((name, torch.zeros(shape)) for name, shape in names.items()), folder / "llama")
    language_config_of(_MODEL).save_pretrained(folder / "llama")
    network, config = random_haplovl(_MODEL), Config(model=_MODEL, data=DataConfig())
    save_training_checkpoint(network, config, folder / "training")
    _save_in_pieces(network, config, folder / "run")
    tokenizer = load_tokenizer(train_tokenizer(folder))
    export_checkpoint(folder / "training", folder / "haplo", tokenizer, load_chat_template("vicuna_v1"))
    return folder


def _save_in_pieces(network: torch.nn.Module, config: Config, folder: Path, ranks: int = 2) -> None:
    """Save a checkpoint as `ranks` ranks of ZeRO save it, moments and all."""
    aside = folder / ".global_step7.unfinished"
    aside.mkdir(parents=True)
    (aside / "config.json").write_text(json.dumps({**config.to_dict(), "iteration": 7}))
    for rank in range(ranks):
        pieces = []
        for name, parameter in network.named_parameters():
            values = parameter.detach().reshape(-1)
            size = -(-len(values) // ranks)
            mine = values[rank * size : (rank + 1) * size]
            for kind in (WEIGHT, *MOMENTS):
                pieces.append((Piece(name, kind, None, 0, 1, rank * size, len(mine)), mine.clone()))
        write_rank(aside, rank, pieces, "run")
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
    complete(aside, folder / "global_step7", ranks, shapes, torch.float32, patience=1.0, run_id="run")
    (folder / "latest").write_text("global_step7\n")


def _import_language_model(folder: Path) -> None:
    source = open_language_model(folder / "llama", _MODEL, stage=FINETUNE)
    write_initial_checkpoint([source], Config(model=_MODEL), folder / "out")


def _import_haplo(folder: Path) -> None:
    source, model = open_released(folder / "haplo", _MODEL)
    write_initial_checkpoint([source], Config(model=model), folder / "out")


def _export(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    export_checkpoint(folder / "training", folder / "exported", tokenizer, load_chat_template("vicuna_v1"))


def _export_pieces(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    export_checkpoint(folder / "run", folder / "exported", tokenizer, load_chat_template("vicuna_v1"))


@pytest.mark.parametrize("convert", [_import_language_model, _import_haplo, _export, _export_pieces])
def test_peak_memory(folders: Path, convert: Callable[[Path], None]) -> None:
    reader = WeightReader(folders / "training" / "global_step7")
    assert sum(reader.get(name).nbytes for name in reader.names()) / MIB > 100 * _LARGEST
    convert(folders)  # From now on memory holds what libraries keep for good.
    assert peak_mib(lambda: convert(folders), "cpu") < _ALLOWED
