"""Saving and resuming a run, in any layout: between DeepSpeed's engine and the files of `checkpoint`."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_haplovl.checkpoint import write
from megatron_haplovl.checkpoint.folders import unfinished
from megatron_haplovl.checkpoint.pieces import MOMENTS, PieceReader
from megatron_haplovl.checkpoint.state import read_state, state_of
from megatron_haplovl.config.schema import Config
from megatron_haplovl.engine.engine_state import (
    HostPiece,
    dtype_of,
    local_pieces,
    make_optimizer_state,
    pieces_on_host,
)
from megatron_haplovl.parallel.sharded_model import ShardedModel

logger = logging.getLogger(__name__)


# A failed save is tried again so often in an interval, and so long after another at the end of a run (seconds).
_TRIES_IN_AN_INTERVAL = 10
_PAUSE_AT_THE_END = 5.0


@dataclass(frozen=True)
class Saving:
    """What a writer must know beside the settings."""

    run_id: str
    """See `Operation.run_id`."""
    bytes: int
    """Of one checkpoint."""
    require_lock: Callable[[], None]
    """Raises if the --save folder is no longer this run's."""
    more_state: Callable[[], Mapping[str, Any]] = dict
    """Says what else is in `training_state.json`."""


class CheckpointWriter:
    """Writes checkpoints of a run, at once or beside the training (--async-save).

    A full disk or another error of the file system is reported and does not end the run, and what was saved before
    stays. The save is tried again ten times in a --save-interval. When --max-failed-saves of those that were due have
    failed one after the other, or the last one, the run ends.

    Args:
        engine: the DeepSpeed engine.
        model: what it trains.
        config: `config.checkpoint` says where and how.
        saving: see :class:`Saving`.
    """

    def __init__(self, engine: Any, model: ShardedModel, config: Config, saving: Saving) -> None:
        self._engine, self._model, self._config, self._saving = engine, model, config, saving
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[_Failure | None] | None = None
        self._done = ""
        self._saved = True
        self._is_retry = False
        self._failed = 0
        self._at = (0, "")

    def is_due(self, step: int) -> bool:
        """Whether to save after this step. Called by every rank after every step; the same answer on all."""
        interval = self._config.checkpoint.save_interval
        if interval is None:
            return False
        if step % interval == 0:
            return True
        if step % max(1, interval // _TRIES_IN_AN_INTERVAL):
            return False
        world = self._model.groups.world
        if self._writing is not None and all(world.gather_objects(self._writing.done())):
            self.finish()
        return not self._saved

    def save(self, iteration: int, plan_key: str) -> None:
        """Write everything that a resumed run needs. Called by every rank.

        Args:
            iteration: optimizer steps done.
            plan_key: the training data's `BatchLoader.plan_key`; with the iteration, the position in the data.

        Raises:
            ValueError: another run has taken the folder over, or --max-failed-saves have failed.
        """
        started = time.perf_counter()
        self.finish()
        interval = self._config.checkpoint.save_interval
        again = iteration == self._at[0] or interval is None or iteration % interval != 0
        self._is_retry = not self._saved and again
        self._at = (iteration, plan_key)
        settings, world = self._config.checkpoint, self._model.groups.world
        assert settings.save is not None
        folder = Path(settings.save) / f"global_step{iteration}"
        self._report(self._attempt(lambda: self._prepare(folder) if world.rank == 0 else None))
        if not self._saved:
            return
        pieces = pieces_on_host(self._engine, self._model)
        stalled = time.perf_counter() - started

        def write_all() -> _Failure | None:
            return self._attempt(lambda: self._write(folder, pieces, started, stalled))

        if settings.async_save:
            self._writing = self._pool.submit(write_all)
        else:
            self._report(write_all(), self._done)

    def more_state(self) -> Mapping[str, Any]:
        """What else is in `training_state.json`, see :class:`Saving`."""
        return self._saving.more_state()

    def finish(self) -> None:
        """Wait for a checkpoint that is still being written. Called by every rank.

        Raises:
            ValueError: see :meth:`save`.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self._report(writing.result(), self._done)

    def close(self) -> None:
        """Finish the last checkpoint at the end of a run; if it has failed, try it again. Called by every rank.

        Raises:
            ValueError: the run's last checkpoint could not be saved.
        """
        self.finish()
        for _ in range(self._config.checkpoint.max_failed_saves - 1):
            if not self._saved:
                time.sleep(_PAUSE_AT_THE_END)
                self.save(*self._at)
                self.finish()
        if not self._saved:
            raise ValueError(
                f"the last checkpoint could not be saved to {self._config.checkpoint.save}; see above. Make room or "
                "mend it, and start the run again: it goes on from the checkpoint before"
            )

    def _report(self, failure: _Failure | None, done: str | None = None) -> None:
        """Agree on whether any rank has failed, clean up, and count. The answer is the same on every rank."""
        found = [failure for failure in self._model.groups.world.gather_objects(failure) if failure is not None]
        self._saved = not found
        if not found:
            if done is not None:
                self._failed = 0
                logger.info(done)
            return
        text = "; ".join(dict.fromkeys(failure.text for failure in found))
        if lost := [failure for failure in found if failure.is_final]:
            raise ValueError(lost[0].text)
        settings, first = self._config.checkpoint, self._model.groups.world.rank == 0
        assert settings.save is not None
        if first:
            write.discard(unfinished(Path(settings.save) / f"global_step{self._at[0]}"))
        self._failed += not self._is_retry
        if self._failed >= settings.max_failed_saves and settings.save_interval is not None:
            raise ValueError(
                f"{self._failed} saves in a row have failed (--max-failed-saves {settings.max_failed_saves}), the last "
                f"one after step {self._at[0]}: {text}. Make room or mend it, and start the run again: it goes on from "
                f"the newest checkpoint in {settings.save}"
            )
        if first:
            logger.warning(f"saving failed{' again' if self._is_retry else ''}, the run goes on: {text}")

    def _attempt(self, action: Callable[[], None]) -> _Failure | None:
        rank = self._model.groups.world.rank
        try:
            action()
        except OSError as error:
            # Said at once: the next collective may never end, if another rank hangs.
            logger.warning(f"saving failed: {error}")
            return _Failure(f"rank {rank}: {error}", is_final=False)
        except ValueError as error:
            return _Failure(str(error), is_final=True)
        return None

    def _prepare(self, folder: Path) -> None:
        self._saving.require_lock()
        iteration, plan_key = self._at
        state = state_of(self._config, iteration, plan_key, self._saving.run_id, self.more_state())
        write.prepare(unfinished(folder), self._config, state, self._saving.bytes)

    def _write(self, folder: Path, pieces: list[HostPiece], started: float, stalled: float) -> None:
        world, aside = self._model.groups.world, unfinished(folder)
        try:
            write.write_rank(aside, world.rank, pieces, self._saving.run_id)
        except OSError:
            with contextlib.suppress(OSError):
                write.mark_failed(aside, world.rank)
            raise
        if world.rank == 0:
            self._publish(aside, folder)
        seconds = time.perf_counter() - started
        waited = stalled if self._config.checkpoint.async_save else seconds
        self._done = f"saved {folder} ({seconds:.1f} s, of which training waited {waited:.1f} s)"

    def _publish(self, aside: Path, folder: Path) -> None:
        # Gives up before the other ranks do; they wait in a collective for this rank's answer.
        patience = self._config.parallel.timeout_of_steps[0] / 2
        write.complete(
            aside,
            folder,
            self._model.groups.world.size,
            self._model.shapes,
            dtype_of(self._engine),
            patience,
            self._saving.run_id,
            self._saving.require_lock,
        )
        write.publish(folder, self._config.checkpoint.keep_last, self._config.checkpoint.keep_every)


@dataclass(frozen=True)
class _Failure:
    """Why a rank could not do its part of a save."""

    text: str
    is_final: bool
    """Whether it will not be better another time."""


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
        ValueError: the global batch size, its ramp or the data has changed, so that the position in the data would be
            lost, or other parameters are trained than before.
    """
    state = read_state(folder)
    if state.global_batch_size != config.schedule.global_batch_size:
        raise ValueError(
            f"{folder} was saved with --global-batch-size {state.global_batch_size}, this run has "
            f"{config.schedule.global_batch_size}; the position in the data would be lost, so keep it, or start anew "
            "from its weights: add --finetune, with another --save"
        )
    if state.rampup_batch_size != config.schedule.rampup_batch_size:
        raise ValueError(
            f"{folder} was saved with {_ramp(state.rampup_batch_size)}, this run has "
            f"{_ramp(config.schedule.rampup_batch_size)}; the position in the data would be lost, so keep it, or start "
            "anew from its weights: add --finetune, with another --save"
        )
    if state.plan_key != plan_key:
        raise ValueError(
            f"{folder} was trained on other data, or on the same in another order; to resume, keep the preprocessed "
            "data, --data-path with its weights, --aux-data-path, --seed, --seq-length, --packing and the image flags; "
            "to start anew from its weights, add --finetune, with another --save"
        )
    reader = PieceReader(folder)
    make_optimizer_state(engine, state.iteration - state.skipped_iterations)
    model.groups.world.together(lambda: _copy_pieces(engine, model, reader))
    engine.global_steps = state.iteration
    return state.iteration


def _ramp(numbers: tuple[int, ...]) -> str:
    return f"--rampup-batch-size {' '.join(map(str, numbers))}" if numbers else "no --rampup-batch-size"


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
