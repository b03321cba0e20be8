"""Decides of every step whether the weights may be updated by it, and what happens if they may not."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from megatron_haplovl.config.schema import GuardConfig
from megatron_haplovl.data.batch import StepCounts
from megatron_haplovl.engine.gate import Verdict
from megatron_haplovl.engine.metrics import reduce_metrics
from megatron_haplovl.engine.steps import Judge, StepResult, Sums
from megatron_haplovl.operation.endings import ExitCode, RunEnd
from megatron_haplovl.training.guards.diagnosis import Diagnosis
from megatron_haplovl.training.guards.replicas import Replicas
from megatron_haplovl.training.guards.spikes import SpikeWatch
from megatron_haplovl.training.guards.steps_to_skip import StepsToSkip

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Findings:
    """What is wrong with the step that is under way; the same on every rank but for `finite_here`."""

    loss: bool = False
    """A loss is not finite."""
    gradient: bool = False
    """A gradient is not finite."""
    finite_here: bool = True
    """This rank's part of the summed gradients is finite."""
    spike: float | None = None
    """Loss over median."""


class Guard:
    """Everything that is checked in a step.

    Args:
        config: what is checked.
        diagnosis: finds sources.
        replicas: compares weights.
        to_skip: steps that are passed over.
        state: of the run that is resumed; see :meth:`state`.
        device: where losses are.
    """

    def __init__(
        self,
        config: GuardConfig,
        diagnosis: Diagnosis,
        replicas: Replicas,
        to_skip: StepsToSkip,
        state: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        self._config, self._diagnosis, self._replicas, self._to_skip = config, diagnosis, replicas, to_skip
        self._groups, self._device = diagnosis.model.groups, device
        self.skipped = int(state.get("skipped_iterations", 0))
        """Steps since the first one of the run that have not updated the weights."""
        self.not_finite = int(state.get("nan_iterations", 0))
        """Those of them whose loss or gradient was not finite."""
        self._in_a_row = int(state.get("skipped_in_a_row", 0))
        self._spikes = SpikeWatch(config.spiky_loss_factor, state.get("recent_losses", ()))
        self._findings = _Findings()

    def state(self) -> dict[str, Any]:
        """What a resumed run must know, for `training_state.json`."""
        return {
            "skipped_iterations": self.skipped,
            "nan_iterations": self.not_finite,
            "skipped_in_a_row": self._in_a_row,
            "recent_losses": self._spikes.losses,
        }

    def describe(self) -> list[str]:
        """For the log's first lines: what differs from the usual."""
        config, lines = self._config, []
        if not config.check_for_nan_in_loss_and_grad:
            lines.append(
                "--no-check-for-nan-in-loss-and-grad: losses and gradients are not looked at; what is not finite goes "
                "into the weights"
            )
        if config.max_skipped_steps:
            lines.append(
                f"--max-skipped-steps: up to {config.max_skipped_steps} steps in a row are left out if a loss or a "
                "gradient is not finite"
            )
        if config.check_for_spiky_loss:
            what = "trained on" if config.spiky_loss_action == "warn" else "passed over after a return to the last save"
            lines.append(
                f"--check-for-spiky-loss: a loss of more than {config.spiky_loss_factor:g} times the median of the "
                f"last steps is named, and {what}; {len(self._spikes.losses)} steps are known"
            )
        if config.check_replicas is not None:
            lines.append(self._replicas.describe(config.check_replicas))
        if self._to_skip.words is not None:
            lines.append(self._to_skip.words)
        return lines

    def passes_over(self, step: int) -> bool:
        """Whether a step (counted from 0) is passed over; it is counted and said, then."""
        reason = self._to_skip.reason(step + 1)
        if reason is None:
            return False
        logger.info(f"step {step + 1} is passed over: {reason}")
        self.skipped += 1
        return True

    def judge(self, step: int, counts: StepCounts) -> Judge:
        """What decides of a step (counted from 0) whether it may update the weights."""
        return partial(self._judge, step, counts)

    def _judge(self, step: int, counts: StepCounts, sums: Sums) -> Verdict:
        config, interval = self._config, self._config.check_replicas
        if interval is not None and (step + 1) % interval == 0:
            # Before the update: ZeRO 1 and 2 would write the weights anew, and gradients of wrong weights stay.
            self._compare_replicas(step, "the weights were not updated")
        terms, groups = self._diagnosis.terms, self._groups
        losses = reduce_metrics(sums, terms, counts, groups.stages_of_replicas)
        losses = {"loss": sum(term.weight * losses[term.name] for term in terms if term.weight is not None), **losses}
        self._findings = _Findings()
        if not (config.check_for_nan_in_loss_and_grad or config.check_for_spiky_loss):
            return Verdict(losses)
        finite, spike = True, None
        flags = torch.zeros(3, device=self._device)
        if config.check_for_nan_in_loss_and_grad:
            flags[1] = ~self._diagnosis.steps.gradients_are_finite()
            flags[0] = not all(math.isfinite(value) for value in losses.values())
        if config.check_for_spiky_loss:
            spike = self._spikes.ratio(losses["loss"])
            flags[2] = spike is not None
        finite = not flags[1]
        # One answer for all ranks, though tensor-parallel ranks have computed the losses each for itself.
        loss, gradient, is_spike = (bool(flag) for flag in groups.world.sum(flags))
        if is_spike and not (loss or gradient):
            ratio = max(r for r in groups.control.gather_objects(spike) if r is not None)
            self._findings = _Findings(spike=ratio)
            return Verdict(losses, update=config.spiky_loss_action == "warn")
        self._findings = _Findings(loss, gradient, finite)
        return Verdict(losses, update=not (loss or gradient))

    def after(self, step: int, result: StepResult) -> None:
        """Act on what was found in a step (counted from 0), now that it is over. Called by every rank.

        Raises:
            RunEnd: the run must not go on from here.
        """
        found, loss = self._findings, result.losses["loss"]
        if found.loss:
            words = self._diagnosis.of_loss(step, result.losses, result.each)
            self._leave_out(step, words, "loss not finite")
        elif found.gradient:
            words = self._diagnosis.of_gradient(step, result.counts, finite_here=found.finite_here)
            self._leave_out(step, words, "gradient not finite")
        elif found.spike is not None:
            words = self._diagnosis.of_spike(step, result.counts, found.spike, loss, result.each)
            self._spike(step, words)
        elif not result.updated:
            self._count_left_out_by_deepspeed(step)
        if result.updated:
            self._in_a_row = 0
            if math.isfinite(loss):
                self._spikes.add(loss)

    def before_save(self, step: int) -> None:
        """What must be right before a checkpoint is written after `step` steps. Called by every rank.

        Raises:
            RunEnd: ranks have different weights that should be the same.
        """
        if self._config.check_replicas is not None:
            self._compare_replicas(step - 1, "nothing was saved")

    def _leave_out(self, step: int, words: str, cause: str) -> None:
        """A step that is not finite has not updated the weights; end the run, or say so and go on."""
        limit, number = self._config.max_skipped_steps, step + 1
        sentence = f"step {number}: {words}; the weights were not updated"
        if limit == 0:
            raise RunEnd(
                ExitCode.MACHINE_FAULT,
                f"{sentence}. Started again, the run repeats the step from its last checkpoint; if it fails again, "
                f"--iterations-to-skip {number} passes it over",
                cause=cause,
                step=step,
            )
        self._in_a_row += 1
        if self._in_a_row > limit:
            raise RunEnd(
                ExitCode.NEEDS_PERSON,
                f"{sentence}. That is step {self._in_a_row} in a row, and --max-skipped-steps is {limit}",
                cause="too many skipped steps",
                step=step,
            )
        self.skipped += 1
        self.not_finite += 1
        if self._groups.world.rank == 0:
            logger.warning(f"{sentence}; skipped ({self._in_a_row} in a row, --max-skipped-steps {limit})")

    def _count_left_out_by_deepspeed(self, step: int) -> None:
        # Only with --no-check-for-nan-in-loss-and-grad; ZeRO looks at the norm whatever the flags say.
        self.skipped += 1
        self.not_finite += 1
        if self._groups.world.rank == 0:
            logger.warning(
                f"step {step + 1}: DeepSpeed has left the update out, because the gradient norm is not finite"
            )

    def _spike(self, step: int, words: str) -> None:
        number, control = step + 1, self._groups.control
        if self._config.spiky_loss_action == "warn":
            if control.rank == 0:
                logger.warning(f"step {number}: {words}; the step was trained on")
            return
        listed = None
        if control.rank == 0:
            try:
                self._to_skip.add(number, words.partition(";")[0])
                listed = "it is on the list of steps to skip"
            except OSError as error:
                listed = f"it could not be put on the list of steps to skip ({error})"
        listed = control.gather_objects(listed)[0]
        raise RunEnd(
            ExitCode.MACHINE_FAULT,
            f"step {number}: {words}; the weights were not updated. {listed.capitalize()}, so started again, the run "
            "goes on from its last checkpoint and passes the step over",
            cause="loss spike",
            step=step,
        )

    def _compare_replicas(self, step: int, consequence: str) -> None:
        found = self._replicas.compare()
        if found is not None:
            raise RunEnd(
                ExitCode.MACHINE_FAULT,
                f"step {step + 1}: {found.words}; {consequence}. Started again, the run goes on from its last "
                "checkpoint; if the same rank is named again, take its machine out",
                cause="replicas differ",
                step=step,
            )
