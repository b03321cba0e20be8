"""--profile: torch's profiler over some steps, with a named range for every part of the model."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_haplovl.config.schema import ProfileConfig
from megatron_haplovl.model.haplovl import LayeredModel
from megatron_haplovl.training.sinks.attempts import Attempts

logger = logging.getLogger(__name__)

_PHASES = {"loader": "loader", "forward": "forward", "backward": "backward", "reduce": "reduce and optimizer"}


class Profiler:
    """Records the steps behind --profile-step-start up to --profile-step-end on the ranks of --profile-ranks.

    Args:
        config: which steps and ranks, and what.
        folder: receives the traces.
        rank: this rank.
        module: this rank's layers.
        device: what they run on.
    """

    def __init__(
        self, config: ProfileConfig, folder: Path, rank: int, module: LayeredModel, device: torch.device
    ) -> None:
        self._config, self._folder, self._rank = config, folder, rank
        self._module, self._device = module, device
        self._attempt = Attempts("profile")
        self._ranges = contextlib.ExitStack()
        self._phase = _Range()
        self._layer = _Range()
        self._profile: Any = None
        self.is_wanted = config.profile and rank in config.profile_ranks
        if self.is_wanted and config.record_memory_history and device.type != "cuda":
            logger.warning(f"--record-memory-history: torch keeps it for GPUs only, not for {device}; there is none")

    def before_step(self, done: int) -> None:
        """Called before every step, with the number of those that are done."""
        if self.is_wanted and done == self._config.profile_step_start:
            self._attempt(self._start)

    def after_step(self, done: int) -> None:
        """Called after every step, with the number of those that are done."""
        if self._profile is None:
            return
        if done >= self._config.profile_step_end:
            self._attempt(self._stop)
        else:
            self._profile.step()

    def enter(self, phase: str) -> None:
        """A phase of the step begins (`operation.phase`)."""
        if self._profile is not None:
            self._layer.leave()
            self._phase.enter(_PHASES.get(phase, phase))

    def close(self) -> None:
        """Write what has been recorded, if the run ends before --profile-step-end."""
        if self._profile is not None:
            self._attempt(self._stop)

    def _start(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        self._folder.mkdir(parents=True, exist_ok=True)
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            if self._config.record_memory_history:
                torch.cuda.memory._record_memory_history(max_entries=1_000_000)
        self._ranges.enter_context(_named_layers(self._module, self._layer))
        self._profile = profile(activities=activities)
        self._profile.start()

    def _stop(self) -> None:
        self._layer.leave()
        self._phase.leave()
        self._ranges.close()
        recorded, self._profile = self._profile, None
        recorded.stop()
        name = f"rank{self._rank}_steps{self._config.profile_step_start + 1}-{self._config.profile_step_end}"
        recorded.export_chrome_trace(str(self._folder / f"{name}.json.gz"))
        order = "self_cuda_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        table = recorded.key_averages().table(sort_by=order, row_limit=60)
        (self._folder / f"{name}.txt").write_text(table)
        if self._config.record_memory_history and self._device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(self._folder / f"{name}_memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        logger.info(f"profile: {self._folder / name}.json.gz (open in ui.perfetto.dev) and .txt")


class _Range:
    """At most one named range at a time."""

    def __init__(self) -> None:
        self._open: Any = None

    def enter(self, name: str) -> None:
        self.leave()
        self._open = torch.profiler.record_function(name)
        self._open.__enter__()

    def leave(self) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None


@contextlib.contextmanager
def _named_layers(module: LayeredModel, backward: _Range) -> Iterator[None]:
    """Name the forward pass of every layer, and its backward pass: from its output's gradient to the next one's."""
    handles = []
    for name, layer in module.layers().items():
        forward, label = _Range(), f"head: {name}" if name == module.HEAD else name

        def before(
            layer: nn.Module, inputs: tuple[Any, ...], forward: _Range = forward, label: str = label
        ) -> tuple[Any, ...]:
            forward.enter(label)
            # The head computes the loss by a function that it is given last.
            return (*inputs[:-1], _named("loss", inputs[-1])) if label.startswith("head: ") else inputs

        def after(_layer: nn.Module, _inputs: Any, output: Any, forward: _Range = forward, label: str = label) -> None:
            forward.leave()
            if isinstance(output, torch.Tensor) and output.requires_grad:
                output.register_hook(lambda _gradient: backward.enter(f"backward: {label}"))

        handles += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        with torch.profiler.record_function(name):
            return function(*arguments)

    return call
