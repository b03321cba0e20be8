"""How a step's micro-batches go through DeepSpeed: one after the other, or through its pipeline.

Both classes do the same for the loop. They differ in who calls forward and backward: we or DeepSpeed's schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from megatron_haplovl.data.batch import Batch, StepCounts
from megatron_haplovl.engine.gate import UpdateGate, Verdict, gradients_are_finite
from megatron_haplovl.engine.metrics import total_loss
from megatron_haplovl.engine.pipeline import MicroBatchSlot
from megatron_haplovl.losses.terms import LossTerm

Sums = dict[str, torch.Tensor]
"""Losses of this rank's micro-batches, summed over tokens. With several sources, the sums by source, too, on ranks that
compute losses (`losses.by_source`)."""

EnterPhase = Callable[[str], None]
"""Is told what a rank begins to do; see `operation.phase.PHASES`."""

Judge = Callable[[Sums], Verdict]
"""From this rank's sums over a step to the step's losses and whether the weights may be updated. Called once in a step
by every rank, when gradients are complete and no weight has changed."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports."""

    losses: dict[str, float]
    """Losses of the whole global batch by name; "loss" is the trained total. Equal on every rank. Empty for a step that
    was passed over."""
    grad_norm: float | None
    """Norm of the gradients before clipping, over all ranks; None if the weights were not updated."""
    counts: StepCounts
    """Valid tokens of the whole global batch."""
    sums: Sums
    """This rank's."""
    each: tuple[Sums, ...] = ()
    """The same for each of its micro-batches, on ranks that compute losses."""

    @property
    def updated(self) -> bool:
        """Whether the weights were updated."""
        return self.grad_norm is not None


class _EngineSteps:
    """What both kinds of steps are asked about DeepSpeed's engine."""

    def __init__(self, engine: Any, grad_norm: Callable[[], float], device: torch.device) -> None:
        self._engine, self._grad_norm, self._device = engine, grad_norm, device
        self._gate = UpdateGate(engine)

    @property
    def _accumulation(self) -> int:
        """Micro-batches that a rank goes through in one optimizer step."""
        return int(self._engine.gradient_accumulation_steps())

    def set_accumulation(self, micro_batches: int) -> None:
        """Say how many micro-batches a rank goes through in the next step. Called by every rank, with the same number.

        DeepSpeed updates the weights when the micro-batches of all steps together are a multiple of that number, so
        with another number they are counted from here on.
        """
        if micro_batches == self._accumulation:
            return
        per_pass = self._engine.train_batch_size() // self._accumulation
        self._engine.set_train_batch_size(micro_batches * per_pass)
        assert self._accumulation == micro_batches
        self._engine.micro_steps = 0

    def gradients_are_finite(self) -> torch.Tensor:
        """See :func:`engine.gate.gradients_are_finite`; for a :data:`Judge`."""
        return gradients_are_finite(self._engine, self._device)

    def learning_rates(self) -> dict[str, float]:
        """The rate of each trained part, as the optimizer has it."""
        return {group["name"].removesuffix(" (no decay)"): group["lr"] for group in self._engine.optimizer.param_groups}

    def set_learning_rate(self, rate: float) -> None:
        """Set the rate of the next step; a group's own is in proportion (`lr_ratio`)."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate * group["lr_ratio"]

    def _result(self, counts: StepCounts, sums: Sums, each: list[Sums]) -> StepResult:
        verdict = self._gate.verdict()
        norm = self._grad_norm() if verdict.update else None
        return StepResult(verdict.losses, norm, counts, sums, tuple(each))


class DirectSteps(_EngineSteps):
    """Every rank runs whole micro-batches.

    Args:
        engine: DeepSpeed's ordinary engine.
        losses: micro-batch -> sums of the losses, through the engine.
        terms: what the sums are divided by.
        grad_norm: the norm of the last step's gradients before clipping.
        enter_phase: is told what begins.
        replicas: ranks over which DeepSpeed averages gradients.
        device: where the batches are needed.
    """

    reads_data = True
    """Whether this rank reads batches at all."""

    def __init__(
        self,
        engine: Any,
        losses: Callable[[Batch], Sums],
        terms: Sequence[LossTerm],
        grad_norm: Callable[[], float],
        enter_phase: EnterPhase,
        *,
        replicas: int,
        device: torch.device,
    ) -> None:
        super().__init__(engine, grad_norm, device)
        self._losses, self._terms = losses, terms
        self._enter_phase, self._replicas = enter_phase, replicas

    def train(self, micro_batches: Iterator[Batch], counts: StepCounts, judge: Judge) -> StepResult:
        """One optimizer step.

        Args:
            micro_batches: as many are taken as :meth:`set_accumulation` says.
            counts: valid tokens of the whole global batch.
            judge: whether the weights may be updated.
        """
        sums = _zeros(self._terms, self._device)
        each: list[Sums] = []
        self._gate.expect(lambda: judge(sums))
        for _ in range(self._accumulation):
            batch = next(micro_batches)
            self._enter_phase("forward")
            found = self._losses(batch.to(self._device))
            # Every rank's share is divided by the token count of the whole batch already, so gradients must be summed
            # over ranks; DeepSpeed averages them, which the factor undoes.
            loss = total_loss(found, self._terms, counts) * self._replicas
            self._enter_phase("backward")
            self._engine.backward(loss, scale_wrt_gas=False)
            _add(sums, found)
            each.append(_detached(found))
            self._enter_phase("reduce")
            self._engine.step()
        return self._result(counts, sums, each)

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterator[Batch], number: int) -> Sums:
        """This rank's sums over `number` micro-batches, in evaluation mode."""
        sums = _zeros(self._terms, self._device)
        self._engine.eval()
        for _ in range(number):
            _add(sums, self._losses(next(micro_batches).to(self._device)))
        self._engine.train()
        return sums


class PipelineLoss:
    """The end of the last stage: from the head's input to the loss of a micro-batch. Keeps the sums.

    It is part of the stage's forward pass. A separate loss function, such as DeepSpeed takes, would lose the head's
    bf16 gradients: DeepSpeed clears what it finds when backward reaches the forward pass's output.

    Args:
        losses: (the head's input, micro-batch) -> sums of the losses.
        terms: what the sums are divided by.
        replicas: ranks over which DeepSpeed averages gradients.
        device: where the batches are needed.
    """

    def __init__(
        self,
        losses: Callable[[torch.Tensor, Batch], Sums],
        terms: Sequence[LossTerm],
        *,
        replicas: int,
        device: torch.device,
    ) -> None:
        self._losses, self._terms, self._replicas, self._device = losses, terms, replicas, device
        self.counts = StepCounts(0, 0, 0, 0, 0)
        """Valid tokens of the whole global batch that is under way."""
        self.accumulation = 1
        """Micro-batches of it on this rank."""
        self.sums = _zeros(terms, device)
        self.each: list[Sums] = []

    def __call__(self, hidden_BSD: torch.Tensor, batch: Batch) -> torch.Tensor:
        found = self._losses(hidden_BSD, batch.to(self._device))
        _add(self.sums, found)
        self.each.append(_detached(found))
        # DeepSpeed averages over micro-batches and replicas; the factor undoes both.
        return total_loss(found, self._terms, self.counts) * (self.accumulation * self._replicas)

    def start(self, counts: StepCounts | None = None, accumulation: int = 1) -> None:
        """Forget the sums and begin anew; without counts, only sums are wanted."""
        self.sums, self.each = _zeros(self._terms, self._device), []
        if counts is not None:
            self.counts, self.accumulation = counts, accumulation


class PipelinedSteps(_EngineSteps):
    """Every rank runs its stage; DeepSpeed's schedule calls forward, backward and the optimizer.

    Args:
        engine: DeepSpeed's pipeline engine.
        slot: where the stage looks for whole micro-batches.
        loss: the end of the last stage.
        grad_norm: as for :class:`DirectSteps`.
        enter_phase: is told what begins.
        device: where the losses are.
        reads_data: whether this is the first or the last stage.
    """

    def __init__(
        self,
        engine: Any,
        slot: MicroBatchSlot,
        loss: PipelineLoss,
        grad_norm: Callable[[], float],
        enter_phase: EnterPhase,
        *,
        device: torch.device,
        reads_data: bool,
    ) -> None:
        super().__init__(engine, grad_norm, device)
        self._slot, self._loss = slot, loss
        self._enter_phase, self.reads_data = enter_phase, reads_data

    def train(self, micro_batches: Iterator[Batch], counts: StepCounts, judge: Judge) -> StepResult:
        """See :meth:`DirectSteps.train`. The sums are zero on all stages but the last."""
        self._loss.start(counts, self._accumulation)
        self._gate.expect(partial(self._judge, judge))
        # Forward and backward passes of several micro-batches alternate in the schedule.
        self._enter_phase("forward")
        self._engine.train_batch(self._for_schedule(micro_batches))
        return self._result(counts, self._loss.sums, self._loss.each)

    def evaluate(self, micro_batches: Iterator[Batch], number: int) -> Sums:
        """See :meth:`DirectSteps.evaluate`. The sums are zero on all stages but the last."""
        self._loss.start()
        self._engine.eval_batch(
            self._for_schedule(micro_batches), reduce_output=None, bcast_loss=False, num_micro_batches=number
        )
        return self._loss.sums

    def _for_schedule(self, micro_batches: Iterator[Batch]) -> Iterator[tuple[tuple[torch.Tensor, ...], tuple[()]]]:
        """What DeepSpeed hands to the first stage, and no labels; the rest of a batch goes by the slot."""
        for batch in micro_batches:
            self._slot.put(batch)
            yield (batch.kv_start_BS, batch.kv_end_BS, batch.position_ids_BS), ()

    def _judge(self, judge: Judge) -> Verdict:
        self._enter_phase("reduce")
        return judge(self._loss.sums)


def _zeros(terms: Sequence[LossTerm], device: torch.device) -> Sums:
    return {term.name: torch.zeros((), device=device) for term in terms}


def _detached(found: Sums) -> Sums:
    return {name: value.detach() for name, value in found.items()}


def _add(sums: Sums, found: Sums) -> None:
    for name, value in found.items():
        if name in sums:
            sums[name] += value.detach()
        else:
            # By source: how many there are, only the batch knows.
            sums[name] = value.detach().clone()
