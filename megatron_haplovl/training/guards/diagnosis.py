"""What is said of a step that must not be trained on: whose fault it is, in which samples and in which layer.

Every method is called by every rank, after the step's gradients have been discarded, and returns the same words.
"""

from __future__ import annotations

import contextlib
import math
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_haplovl.config.schema import Config
from megatron_haplovl.data.batch import StepCounts
from megatron_haplovl.engine.gate import Verdict
from megatron_haplovl.engine.metrics import total_loss
from megatron_haplovl.engine.steps import DirectSteps, PipelinedSteps, Sums
from megatron_haplovl.losses.terms import LossTerm
from megatron_haplovl.parallel.sharded_model import ShardedModel
from megatron_haplovl.training.guards.gradients import traced_gradients
from megatron_haplovl.training.guards.layers import first_weight_not_finite, traced_outputs
from megatron_haplovl.training.guards.micro_batch import MicroBatchName, StepData


@dataclass(frozen=True)
class Diagnosis:
    """Looks for the source of a fault."""

    config: Config
    model: ShardedModel
    steps: DirectSteps | PipelinedSteps
    terms: tuple[LossTerm, ...]
    data: StepData
    folder: Path
    """Receives micro-batches."""

    def of_loss(self, step: int, losses: Mapping[str, float], each: Sequence[Sums]) -> str:
        """A loss is not finite.

        Args:
            step: counted from 0.
            losses: of the global batch.
            each: this rank's sums, micro-batch by micro-batch.
        """
        bad = ", ".join(f"{name} {value}" for name, value in losses.items() if not math.isfinite(value))
        places = self.model.groups.control.gather_objects(self._first_not_finite(each))
        suspects = [(index, rank) for rank, index in enumerate(places) if index is not None]
        if not suspects:
            return (
                f"a loss is not finite ({bad}), though the sums of every rank are: their sum over the ranks went "
                "wrong, which is a fault of a machine or of the network"
            )
        index, rank = min(suspects)
        name = self.data.name(step, index, rank)
        facts = {
            "reason": f"a loss is not finite ({bad})",
            "losses": {key: str(value) for key, value in losses.items()},
        }
        kept = self.data.keep(name, self.folder, facts)
        return f"a loss is not finite ({bad}), from {name.words}; {self._layer(step, name)}; {kept}"

    def of_gradient(self, step: int, counts: StepCounts, *, finite_here: bool) -> str:
        """A gradient is not finite, though the losses are: the step is computed once more, and not applied.

        Args:
            step: counted from 0.
            counts: valid tokens of the whole global batch.
            finite_here: whether this rank's part of the summed gradients was finite.
        """
        groups = self.model.groups
        refused = Verdict({}, update=False)
        with traced_gradients(self.model.module) as trace, self._uncompiled():
            self.steps.train(self.data.read(step), counts, lambda _sums: refused)
        mine = (trace.first(), finite_here, socket.gethostname())
        found = groups.control.gather_objects(mine)
        suspects = [(*first, rank) for rank, (first, _, _) in enumerate(found) if first is not None]
        if not suspects:
            holders = [f"rank {rank} on {host}" for rank, (_, finite, host) in enumerate(found) if not finite]
            return (
                f"a gradient is not finite in what {_listed(holders)} had of the sum over all ranks, though the losses "
                "are; computed once more, every gradient of every rank is finite, which points to a machine or the "
                "network"
            )
        index = min(suspects)[0]
        # Of the ranks that have the same parameter's gradient wrong in this micro-batch, all are named.
        parameter = min((rank, name) for at, name, rank in suspects if at == index)[1]
        ranks = [rank for at, name, rank in suspects if (at, name) == (index, parameter)]
        name = self.data.name(step, index, ranks[0])
        kept = self.data.keep(name, self.folder, {"reason": f"the gradient of {parameter} is not finite"})
        also = f" (and on {_ranks(ranks[1:])})" if len(ranks) > 1 else ""
        return (
            f"the gradient of {parameter} is not finite on rank {ranks[0]}{also}, though the losses are; it is from "
            f"{name.words}; {kept}"
        )

    def of_spike(self, step: int, counts: StepCounts, ratio: float, loss: float, each: Sequence[Sums]) -> str:
        """The loss is a spike: which micro-batch has the largest share of it.

        Args:
            step: counted from 0.
            counts: valid tokens of the whole global batch.
            ratio: loss over median.
            loss: of the global batch.
            each: this rank's sums, micro-batch by micro-batch.
        """
        shares = [float(total_loss(sums, self.terms, counts)) for sums in each]
        found = self.model.groups.control.gather_objects(shares)
        # Tensor-parallel ranks have the same shares, so the first of them is named.
        share, rank, index = max(
            ((share, -rank, index) for rank, shares in enumerate(found) for index, share in enumerate(shares)),
        )
        name = self.data.name(step, index, -rank)
        what = f"the loss {loss:.6g} is {ratio:.1f} times the median of the steps before"
        kept = self.data.keep(name, self.folder, {"reason": what, "share": share})
        return f"{what}; the largest share, {100 * share / loss:.0f} %, is from {name.words}; {kept}"

    def _first_not_finite(self, each: Sequence[Sums]) -> int | None:
        for index, sums in enumerate(each):
            if not all(sums[term.name].isfinite() for term in self.terms):
                return index
        return None

    def _layer(self, step: int, name: MicroBatchName) -> str:
        """All ranks compute the micro-batches of that place once more, without gradients."""
        groups = self.model.groups
        with traced_outputs(self.model.module) as trace, self._uncompiled():
            self.steps.evaluate(self.data.read(step, name.index), 1)
        mine = (groups.data.rank, groups.pipeline.rank, trace.first(), first_weight_not_finite(self.model.module))
        found = groups.control.gather_objects(mine)
        outputs = [
            (stage, *first, rank)
            for rank, (data, stage, first, _) in enumerate(found)
            if first is not None and data == name.data_rank
        ]
        if not outputs:
            layer = (
                "computed once more, the output of every layer is finite, which points to the machine of rank "
                f"{name.rank}"
            )
        else:
            stage, order, module, _ = min(outputs)
            ranks = [rank for *place, rank in outputs if place == [stage, order, module]]
            layer = f"the first layer whose output is not finite is {module}, on {_ranks(ranks)}"
        weights = [(stage, weight, rank) for rank, (_, stage, _, weight) in enumerate(found) if weight is not None]
        if not weights:
            return layer
        _, weight, _ = min(weights)
        return (
            f"{layer}; the weight {weight} is not finite itself, on "
            f"{_ranks([rank for _, other, rank in weights if other == weight])}"
        )

    def _uncompiled(self) -> contextlib.AbstractContextManager[object]:
        # Hooks inside a compiled block would not run.
        if self.config.precision.compile:
            return torch.compiler.set_stance("force_eager")
        return contextlib.nullcontext()


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {_listed([str(rank) for rank in ranks])}"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
