"""The runs of the mixtures in `examples/mixtures`, in miniature."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from megatron_haplovl.config.mixture import VARIABLE, Mixture
from megatron_haplovl.config.mixture_file import read_mixture
from megatron_haplovl.config.schema import Config
from tests.distributed.cases import STEPS, config

MIXTURES = Path(__file__).parents[2] / "examples" / "mixtures"
FILES = sorted(path.name for path in MIXTURES.glob("*.yaml"))
# File -> the recipe that it belongs to.
RECIPES = {name: "distill" if re.match("mix-|mmc4", name) else "full" for name in FILES} | {
    "haplovl-7b-captions.yaml": "align"
}


def variables(folder: Path) -> tuple[str, ...]:
    """What every variable of the files stands for, as words of --data-var."""
    names = {name for file in FILES for name in VARIABLE.findall(_settings(file))}
    return tuple(f"{name}={folder}/{name}" for name in sorted(names))


def _settings(file: str) -> str:
    lines = (MIXTURES / file).read_text(encoding="utf-8").splitlines()
    return "\n".join(line.partition("#")[0] for line in lines)


def read(folder: Path, file: str) -> Mixture:
    """A mixture with its variables."""
    return read_mixture(str(MIXTURES / file), variables(folder), {})


def metrics_file(folder: Path, file: str) -> Path:
    """What a run has logged."""
    return folder / f"{file}.jsonl"


def run_config(folder: Path, file: str, recipe: str) -> Config:
    """A tiny run on a mixture."""
    c = config(recipe, logging__log_interval=STEPS, logging__metrics_file=str(metrics_file(folder, file)))
    data: dict[str, Any] = {
        "mock_data": False,
        "data_config": str(MIXTURES / file),
        "data_var": variables(folder),
        "seq_length": 240,
    }
    return dataclasses.replace(
        c,
        model=dataclasses.replace(c.model, vocab_size=512),
        data=dataclasses.replace(c.data, **data),
        init=dataclasses.replace(c.init, allow_missing=(".*",)),
    )
