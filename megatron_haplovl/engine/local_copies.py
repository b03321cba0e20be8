"""Copies of a run on the machines' own disks (--non-persistent-save-interval): written, found and kept to one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from megatron_haplovl.checkpoint import write
from megatron_haplovl.checkpoint.folders import unfinished
from megatron_haplovl.checkpoint.local_copies import local_root, newest_copy, remove_copies
from megatron_haplovl.checkpoint.machines import find_machines
from megatron_haplovl.checkpoint.state import state_of
from megatron_haplovl.config.schema import Config
from megatron_haplovl.engine.engine_state import dtype_of, pieces_on_host
from megatron_haplovl.parallel.groups import Group
from megatron_haplovl.parallel.sharded_model import ShardedModel

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")


class LocalCopies:
    """The copies of a run's --save folder on this machine. Made, and used, by every rank at once.

    A copy costs little and saves little: it is lost with its machine. So what goes wrong with one is reported and no
    more.

    Args:
        config: with `checkpoint.non_persistent_local_ckpt_dir` and `checkpoint.save`.
        control: all ranks.
        run_id: see `Operation.run_id`.

    Raises:
        ValueError: a rank cannot write there.
    """

    def __init__(self, config: Config, control: Group, run_id: str) -> None:
        settings = config.checkpoint
        assert settings.save is not None and settings.non_persistent_local_ckpt_dir is not None
        self._config, self._control, self._run_id = config, control, run_id
        self._root = local_root(settings.non_persistent_local_ckpt_dir, settings.save)
        self._machines = find_machines(self._root, control, run_id)
        self._leads = control.rank == self._machines.lead

    def newest(self, newer_than: int) -> Path | None:
        """See `checkpoint.local_copies.newest_copy`."""
        return newest_copy(self._root, self._machines, self._control, newer_than)

    def keep_only(self, kept: Path | None) -> None:
        """Remove the copies that this run does not go on from: its steps will be others than theirs."""
        if self._leads:
            remove_copies(self._root, kept)

    def is_due(self, step: int) -> bool:
        """Whether to write one after this step."""
        interval = self._config.checkpoint.non_persistent_save_interval
        return interval is not None and step % interval == 0

    def save(
        self, engine: Any, model: ShardedModel, iteration: int, plan_key: str, more_state: Mapping[str, Any]
    ) -> None:
        """Write a copy, and remove those before it.

        Args:
            engine: the DeepSpeed engine.
            model: what it trains.
            iteration: optimizer steps done.
            plan_key: the training data's `BatchLoader.plan_key`.
            more_state: what else is in `training_state.json`.
        """
        started = time.perf_counter()
        folder = self._root / f"global_step{iteration}"
        aside = unfinished(folder)
        state = state_of(self._config, iteration, plan_key, self._run_id, more_state)
        # The same files on every machine, so that the same manifest names them.
        texts = self._control.gather_objects(write.settings_texts(self._config, state))[0]
        pieces = pieces_on_host(engine, model)

        def prepare() -> None:
            write.discard(aside)
            aside.mkdir(parents=True)
            write.write_settings(aside, *texts)

        def finish(records: list[dict[str, Any]]) -> None:
            for rank in range(self._control.size):
                (aside / f"rank-{rank:05d}.json").unlink(missing_ok=True)
            parts = [{name: value for name, value in record.items() if name != "run_id"} for record in records]
            write.write_manifest(aside, parts, model.shapes, dtype_of(engine), self._run_id)
            write.give_name(aside, folder)

        if self._all(aside, lambda: prepare() if self._leads else None) is None:
            return
        rank = self._control.rank
        records = self._all(aside, lambda: write.write_rank(aside, rank, pieces, self._run_id))
        if records is None or self._all(aside, lambda: finish(records) if self._leads else None) is None:
            return
        self.keep_only(folder)
        logger.info(f"copied to {folder} on each machine ({time.perf_counter() - started:.1f} s)")

    def _all(self, aside: Path, action: Callable[[], _Result]) -> list[_Result] | None:
        """Every rank's result; None, with a warning and nothing left on the disks, if any has failed."""
        result, error = None, None
        try:
            result = action()
        except OSError as failure:
            error = f"rank {self._control.rank}: {failure}"
        answers = self._control.gather_objects((result, error))
        errors = [text for _, text in answers if text is not None]
        if not errors:
            return [result for result, _ in answers]
        if self._leads:
            write.discard(aside)
        logger.warning(f"the local copy failed, the run goes on: {'; '.join(dict.fromkeys(errors))}")
        return None
