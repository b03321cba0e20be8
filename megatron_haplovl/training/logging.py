"""What a run reports: records with their rank, the log line, and the places where the same numbers go."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from megatron_haplovl.config.schema import LoggingConfig

NO_PREFIX = {"no_prefix": True}
"""`extra` of a record that is printed as it is: the lines that tools read."""


class _RankFormatter(logging.Formatter):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        if getattr(record, "no_prefix", False):
            return message
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"[rank {self._rank}] {level}{message}"


def configure_logging(rank: int) -> None:
    """Send this package's records to standard output: from rank 0 all from INFO on, from every other rank the warnings.

    A second call replaces what the first one set up.

    Args:
        rank: this process's rank in the whole run.
    """
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_RankFormatter(rank))
    package = logging.getLogger(__name__.partition(".")[0])
    package.handlers = [handler]
    package.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    package.propagate = False


class _Sink(Protocol):
    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _JsonLines:
    """One JSON object per line: `{"iteration": ..., "time": ..., name: value, ...}`."""

    def __init__(self, path: str) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.file: TextIO = open(path, "a")  # noqa: SIM115 (open as long as the run)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.file.write(json.dumps({"iteration": step, "time": time.time(), **values}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class _TensorBoard:
    def __init__(self, folder: str) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise ValueError("--tensorboard-dir needs the package tensorboard: pip install tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _WeightsAndBiases:
    def __init__(self, project: str, config: dict[str, Any]) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise ValueError("--wandb-project needs the package wandb: pip install wandb")
        import wandb

        self.run = wandb.init(project=project, config=config)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class Sinks:
    """The places that get every logged value, beside the lines for the person who watches.

    Args:
        config: where to report.
        settings: the whole configuration, for trackers that keep it.
        enabled: True on the one rank that reports; on every other rank nothing is recorded.

    Raises:
        ValueError: a tracker's package is not installed.
    """

    def __init__(self, config: LoggingConfig, settings: dict[str, Any], *, enabled: bool) -> None:
        self._sinks: list[_Sink] = []
        if not enabled:
            return
        if config.metrics_file is not None:
            self._sinks.append(_JsonLines(config.metrics_file))
        if config.tensorboard_dir is not None:
            self._sinks.append(_TensorBoard(config.tensorboard_dir))
        if config.wandb_project is not None:
            self._sinks.append(_WeightsAndBiases(config.wandb_project, settings))

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Values for the metrics file and the trackers."""
        for sink in self._sinks:
            sink.write(step, values)

    def close(self) -> None:
        """Flush and close everything."""
        for sink in self._sinks:
            sink.close()


def training_line(step: int, last_step: int, columns: Mapping[str, float | int], title: str = "iteration") -> str:
    """The log line that users of Megatron know: ` iteration 10/ 100 | name: value | ... |`."""
    parts = [f" {title} {step:8d}/{last_step:8d}"]
    for name, value in columns.items():
        parts.append(f" {name}: {value}" if isinstance(value, int) else f" {name}: {_format(name, value)}")
    return " |".join(parts) + " |"


def _format(name: str, value: float) -> str:
    if name in ("elapsed time per iteration (ms)", "loader wait (ms)"):
        return f"{value:.1f}"
    if name in ("samples per second", "tokens per gpu per second (tgs)", "TFLOPs", "grad norm"):
        return f"{value:.3f}"
    return f"{value:.6E}"
