"""Saving and resuming a run, in any layout: between DeepSpeed's engine and the files of `checkpoint`."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from megatron_haplovl.checkpoint import write
from megatron_haplovl.checkpoint.folders import STATE_FILE, unfinished
from megatron_haplovl.checkpoint.pieces import MOMENTS, PieceReader
from megatron_haplovl.config.files import read_json
from megatron_haplovl.config.schema import Config
from megatron_haplovl.engine.engine_state import local_pieces, make_optimizer_state
from megatron_haplovl.parallel.sharded_model import ShardedModel

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes checkpoints of a run, at once or beside the training (--async-save).

    A full disk or another error of the file system is reported and does not end the run, and what was saved before
    stays. Only the failure of the last checkpoint ends it, in :meth:`close`.

    Args:
        engine: the DeepSpeed engine.
        model: what it trains.
        config: `config.checkpoint` says where and how.
        more_state: says what else is in `training_state.json`.
    """

    def __init__(
        self,
        engine: Any,
        model: ShardedModel,
        config: Config,
        more_state: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self._engine, self._model, self._config = engine, model, config
        self._more_state = more_state
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[str | None] | None = None
        self._done = ""
        self._saved = True

    def save(self, iteration: int, plan_key: str) -> None:
        """Write everything that a resumed run needs. Called by every rank.

        Args:
            iteration: optimizer steps done.
            plan_key: the training data's `BatchLoader.plan_key`; with the iteration, the position in the data.
        """
        started = time.perf_counter()
        self.finish()
        settings, world = self._config.checkpoint, self._model.groups.world
        assert settings.save is not None
        folder = Path(settings.save) / f"global_step{iteration}"
        aside = unfinished(folder)
        error = self._attempt(
            lambda: (
                write.prepare(aside, self._config, iteration, plan_key, self._more_state()) if world.rank == 0 else None
            )
        )
        self._saved = not self._agree(error)
        if not self._saved:
            return
        # The pieces are copied, because the training goes on.
        make_optimizer_state(self._engine, None)
        pieces = [
            (local.piece, local.values.to("cpu", copy=True))
            for local in local_pieces(self._engine, self._model)
            if local.is_written
        ]
        stalled = time.perf_counter() - started

        def write_all() -> str | None:
            return self._attempt(lambda: self._write(aside, folder, pieces, started, stalled))

        if settings.async_save:
            self._writing = self._pool.submit(write_all)
        else:
            self._report(write_all())

    def finish(self) -> None:
        """Wait for a checkpoint that is still being written. Called by every rank."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self._report(writing.result())

    def close(self) -> None:
        """Finish the last checkpoint at the end of a run.

        Raises:
            OSError: the run's last checkpoint could not be saved.
        """
        self.finish()
        if not self._saved:
            raise OSError(f"the last checkpoint could not be saved to {self._config.checkpoint.save}; see above")

    def _report(self, error: str | None) -> None:
        self._saved = not self._agree(error)
        if self._saved:
            logger.info(self._done)

    def _agree(self, error: str | None) -> bool:
        """Whether any rank has failed; the answer is the same on every rank, and one rank logs it."""
        errors = [text for text in self._model.groups.world.gather_objects(error) if text is not None]
        if errors and self._model.groups.world.rank == 0:
            logger.warning(f"saving failed, the run goes on: {'; '.join(dict.fromkeys(errors))}")
        return bool(errors)

    def _attempt(self, action: Callable[[], None]) -> str | None:
        try:
            action()
        except OSError as error:
            # Said at once: the next collective may never end, if another rank hangs.
            logger.warning(f"saving failed: {error}")
            return f"rank {self._model.groups.world.rank}: {error}"
        return None

    def _write(self, aside: Path, folder: Path, pieces: list[Any], started: float, stalled: float) -> None:
        world = self._model.groups.world
        try:
            write.write_rank(aside, world.rank, pieces)
        except OSError:
            with contextlib.suppress(OSError):
                write.mark_failed(aside, world.rank)
            raise
        if world.rank == 0:
            try:
                self._publish(aside, folder)
            except OSError:
                shutil.rmtree(aside, ignore_errors=True)
                raise
        seconds = time.perf_counter() - started
        waited = stalled if self._config.checkpoint.async_save else seconds
        self._done = f"saved {folder} ({seconds:.1f} s, of which training waited {waited:.1f} s)"

    def _publish(self, aside: Path, folder: Path) -> None:
        dtype = torch.bfloat16 if self._engine.bfloat16_enabled() else torch.float32
        # Gives up before the other ranks do; they wait in a collective for this rank's answer.
        patience = 30.0 * self._config.parallel.distributed_timeout_minutes
        write.complete(aside, folder, self._model.groups.world.size, self._model.shapes, dtype, patience)
        write.publish(folder, self._config.checkpoint.keep_last)


def load_checkpoint(engine: Any, model: ShardedModel, folder: Path, config: Config, plan_key: str) -> int:
    """Give the engine the optimizer's state and the values that it computes weights from. Called by every rank.

    The number of ranks, the layout and the ZeRO stage may have changed since it was saved. The optimizer's settings
    (rates, decay, betas, clipping) are taken from the flags, not from the checkpoint.

    Args:
        engine: a fresh DeepSpeed engine, whose weights come from the same checkpoint.
        model: what the engine trains.
        folder: see `find_checkpoint`.
        config: the run's settings.
        plan_key: the training data's `BatchLoader.plan_key`.

    Returns:
        Optimizer steps already done.

    Raises:
        ValueError: the global batch size or the data has changed, so that the position in the data would be lost, or
            other parameters are trained than before.
    """
    state = read_json(folder / STATE_FILE)
    if state["global_batch_size"] != config.schedule.global_batch_size:
        raise ValueError(
            f"{folder} was saved with --global-batch-size {state['global_batch_size']}, this run has "
            f"{config.schedule.global_batch_size}; the position in the data would be lost, so keep it, or start anew "
            "from its weights: add --finetune, with another --save"
        )
    if state["plan_key"] != plan_key:
        raise ValueError(
            f"{folder} was trained on other data, or on the same in another order; to resume, keep the preprocessed "
            "data, --data-path with its weights, --aux-data-path, --seed, --seq-length, --packing and the image flags; "
            "to start anew from its weights, add --finetune, with another --save"
        )
    reader = PieceReader(folder)
    make_optimizer_state(engine, state["iteration"])
    model.groups.world.together(lambda: _copy_pieces(engine, model, reader))
    engine.global_steps = state["iteration"]
    return int(state["iteration"])


def _copy_pieces(engine: Any, model: ShardedModel, reader: PieceReader) -> None:
    for name, parameter in model.own_parameters():
        if parameter.requires_grad != reader.has(name, MOMENTS[0]):
            was, now = ("frozen", "trained") if parameter.requires_grad else ("trained", "frozen")
            raise ValueError(
                f"{name} was {was} in {reader.folder} and is {now} now; to train other parts than before, add "
                "--finetune (weights only), with another --save"
            )
    for local in local_pieces(engine, model):
        local.values.copy_(reader.read(local.piece))
