"""A training checkpoint made from the weights of Hugging Face folders, for `--pretrained-checkpoint`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_haplovl.checkpoint.files import write_text
from megatron_haplovl.checkpoint.weight_files import write_weights
from megatron_haplovl.config.schema import Config
from megatron_haplovl.conversion.hf_sources import MappedWeights
from megatron_haplovl.conversion.provenance import MAY_BE_NEW, provenance_table
from megatron_haplovl.model.haplovl import HaploVL

_STEP = "global_step0"


@dataclass(frozen=True)
class ImportSummary:
    """What was written."""

    checkpoint: Path
    """The `global_step0` folder."""
    bytes: int
    table: str
    """Where the tensors of every part of the model came from, and what was left out."""


def write_initial_checkpoint(
    sources: Sequence[MappedWeights], config: Config, save: str | Path, dtype: torch.dtype | None = None
) -> ImportSummary:
    """Write the weights of some folders as a training checkpoint of no steps.

    What no folder holds is left out: a run that starts from the checkpoint initialises it, or takes it from its other
    sources, as if the checkpoint's weights came from the folders themselves.

    Args:
        sources: the folders' weights; if several hold a tensor, the last one wins.
        config: stored beside the weights; `config.model` has the sizes.
        save: like a --save folder: receives `global_step0` and `latest`.
        dtype: number format of the weights; default: the one in which each is stored.

    Raises:
        ValueError: `save` holds the checkpoints of a run.
    """
    save = Path(save)
    latest = save / "latest"
    if latest.is_file() and latest.read_text(encoding="utf-8").strip() != _STEP:
        raise ValueError(f"{save}: holds the checkpoints of a run; give another --save")
    with torch.device("meta"):
        names = [name for name, _ in HaploVL(config.model).named_parameters()]
    source_of = {name: source for source in sources for name in source.names()}
    assert set(source_of) <= set(names), sorted(set(source_of) - set(names))
    origins = [(name, _origin(name, source_of.get(name))) for name in names]
    skipped = [pair for source in sources for pair in source.skipped]

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            if name in source_of:
                tensor = source_of[name].get(name)
                yield name, tensor if dtype is None else tensor.to(dtype)

    written = write_weights(tensors(), save / _STEP)
    write_text(save / _STEP / "config.json", json.dumps({**config.to_dict(), "iteration": 0}, indent=2))
    write_text(latest, _STEP)
    return ImportSummary(save / _STEP, written, provenance_table([*origins, *skipped]))


def _origin(name: str, source: MappedWeights | None) -> str:
    if source is None:
        return "left out: " + ("a run initialises it" if MAY_BE_NEW.fullmatch(name) else "a run must get it elsewhere")
    return source.origin(name)
