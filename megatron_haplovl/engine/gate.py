"""The last moment before the optimizer steps: whether it may, and what becomes of the gradients if it may not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Verdict:
    """What a judge says of a step. The same on every rank."""

    losses: dict[str, float]
    """Losses of the whole global batch by name."""
    update: bool = True
    """Whether the weights may be updated."""


class UpdateGate:
    """Stands where both of DeepSpeed's engines let the optimizer step: gradients are complete, no weight has changed.

    Args:
        engine: the DeepSpeed engine.
    """

    def __init__(self, engine: Any) -> None:
        self._engine, self._step = engine, engine._take_model_step
        self._judge: Callable[[], Verdict] | None = None
        self._verdict: Verdict | None = None
        engine._take_model_step = self._pass

    def expect(self, judge: Callable[[], Verdict]) -> None:
        """Say who judges the step that begins."""
        self._judge, self._verdict = judge, None

    def verdict(self) -> Verdict:
        """What was said of the step that is over; `update` is False, too, if DeepSpeed has left the update out."""
        assert self._verdict is not None
        return self._verdict

    def _pass(self, lr_kwargs: Any = None) -> None:
        assert self._judge is not None
        judge, self._judge = self._judge, None
        verdict = judge()
        if verdict.update:
            skipped = self._engine.skipped_steps
            self._step(lr_kwargs)
            verdict = Verdict(verdict.losses, self._engine.skipped_steps == skipped)
        else:
            discard_gradients(self._engine)
        self._verdict = verdict


def gradients_are_finite(engine: Any, device: torch.device) -> torch.Tensor:
    """Whether all that this rank will step with is finite, and its norm, too; a boolean scalar on the device.

    It reads this rank's part of the summed gradients once. It is called when :class:`UpdateGate` asks its judge.
    """
    gradients = _local_gradients(engine)
    if not gradients:
        return torch.ones((), dtype=torch.bool, device=device)
    return torch.nn.utils.get_total_norm(gradients).isfinite().to(device)


def _local_gradients(engine: Any) -> list[torch.Tensor]:
    """Where each of DeepSpeed's optimizers keeps this rank's part of the summed gradients."""
    optimizer = engine.optimizer
    match engine.zero_optimization_stage():
        case 0:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            return [parameter.grad for parameter in parameters if parameter.grad is not None]
        case 3 if optimizer.offload_optimizer:
            return [flat.grad for flat in optimizer.fp32_partitioned_groups_flat]
        case _ if hasattr(optimizer, "fp32_groups_gradient_flat_partition"):
            return list(optimizer.fp32_groups_gradient_flat_partition)
        case 1 | 2 if optimizer.cpu_offload:
            optimizer._wait_for_offload_copies()
            return [flat.grad for flat in optimizer.single_partition_of_fp32_groups]
    return [gradient for group in optimizer.averaged_gradients.values() for gradient in group]


def discard_gradients(engine: Any) -> None:
    """Forget a step's gradients. Weights, moments and AdamW's number of steps stay as they are, bit for bit.

    ZeRO's optimizers clean up after themselves when they find that gradients have overflowed. So they are told that.
    """
    optimizer = engine.optimizer
    match engine.zero_optimization_stage():
        case 0:
            engine.zero_grad()
        case 3:
            not_finite = torch.tensor(float("nan"))
            with _replaced(optimizer, _get_norm_groups=lambda: [not_finite], _update_scale=_nothing):
                optimizer.step()
        case _ if hasattr(optimizer, "fp32_groups_gradient_flat_partition"):
            optimizer.zero_grad()
        case _:
            overflow = {"check_grad_overflow": True, "has_overflow": lambda *_, **__: True}
            with _replaced(optimizer, **overflow, _update_scale=_nothing):
                optimizer.step()
            # With an offloaded optimizer DeepSpeed forgets to, and the next step would add to these gradients.
            for group in optimizer.averaged_gradients:
                optimizer.averaged_gradients[group] = None


def _nothing(_overflow: bool = False) -> None:
    """In place of DeepSpeed's remark, which would speak of gradients that are not finite whatever the reason is."""


@contextlib.contextmanager
def _replaced(instance: Any, **attributes: Any) -> Iterator[None]:
    """Some attributes of one object, for a while."""
    before = {name: vars(instance)[name] for name in attributes if name in vars(instance)}
    vars(instance).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del vars(instance)[name]
        vars(instance).update(before)
