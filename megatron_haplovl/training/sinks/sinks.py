"""The places where a run's values go, beside the lines for the person who watches."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from megatron_haplovl.config.schema import Config, LoggingConfig
from megatron_haplovl.training.sinks.json_lines import JsonLines, ThisStart
from megatron_haplovl.training.sinks.sink import GuardedSink
from megatron_haplovl.training.sinks.tensorboard import TensorBoard
from megatron_haplovl.training.sinks.weights_and_biases import WeightsAndBiases


def check_packages(config: LoggingConfig) -> None:
    """Check that what the trackers need is there.

    Raises:
        ValueError: a tracker's package is not installed.
    """
    for flag, value, package in (
        ("--tensorboard-dir", config.tensorboard_dir, "tensorboard"),
        ("--wandb-project", config.wandb_project, "wandb"),
    ):
        if value is not None and importlib.util.find_spec(package) is None:
            raise ValueError(f"{flag} needs the package {package}: pip install {package}")


class Sinks:
    """Every sink that the settings ask for. None of them can end the run; what one cannot take is reported once.

    Args:
        config: the run's settings.
        first_step: steps that are done when it starts. A step that is done again stands once in every sink.
        enabled: True on the one rank that reports; on every other rank nothing is recorded.
        start: what the metrics file says of this start.
    """

    def __init__(self, config: Config, first_step: int, *, enabled: bool, start: ThisStart | None = None) -> None:
        self._sinks: list[GuardedSink] = []
        if enabled:
            wanted = _wanted(config, first_step, start or ThisStart())
            self._sinks = [GuardedSink(name, open_sink) for name, open_sink in wanted]

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Values for the metrics file and the trackers, after `step` steps."""
        for sink in self._sinks:
            sink.write(step, values)

    def record_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Texts, such as answers, for the trackers that show them."""
        for sink in self._sinks:
            sink.write_texts(step, texts)

    def close(self) -> None:
        """Flush and close everything."""
        for sink in self._sinks:
            sink.close()


def _wanted(config: Config, first_step: int, start: ThisStart) -> list[tuple[str, Any]]:
    """Name and constructor of each sink."""
    where, wanted = config.logging, list[tuple[str, Any]]()
    if where.metrics_file is not None:
        path = Path(where.metrics_file)
        wanted.append((f"metrics file {path}", partial(JsonLines, path, first_step, start)))
    if where.tensorboard_dir is not None:
        folder = Path(where.tensorboard_dir)
        wanted.append((f"TensorBoard folder {folder}", partial(TensorBoard, folder, first_step)))
    if where.wandb_project is not None:
        save = None if config.checkpoint.save is None else Path(config.checkpoint.save)
        settings = config.to_dict()
        wanted.append(("Weights & Biases", partial(WeightsAndBiases, where.wandb_project, settings, save)))
    return wanted
