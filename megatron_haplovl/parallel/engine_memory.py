"""Bytes that DeepSpeed holds for a rank's weights, as DeepSpeed 0.19 is configured by `training/deepspeed_config.py`.

Per parameter (all) and per trained parameter, z ranks with the same weights:

    bf16, ZeRO 0   autocast: fp32 weights 4; gradients 4; Adam 8. The bf16 copies are made by every forward pass anew
                   and belong to what it keeps (`parallel/cost.py`)
    bf16, ZeRO 1   BF16_Optimizer: weights 2; gradients 2 of the last micro-batch and 4 accumulated, both whole;
                   (master weights 4 + Adam 8) / z
    bf16, ZeRO 2   weights 2; accumulated gradients 4 / z; (4 + 8) / z
    bf16, ZeRO 3   weights 2 / z; accumulated gradients 4 / z; (4 + 8) / z
    fp32           4 in place of every 2, gradients once; ZeRO keeps a master copy even then
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Elements that ZeRO 0, and ZeRO 1 in bf16, reduce at a time (`MEMORY_OPT_ALLREDUCE_SIZE`). Not a setting.
_ALL_REDUCE = 500_000_000
# ZeRO 3 updates its share in groups of at most `sub_group_size` parameters.
_SUB_GROUP = 1_000_000_000


@dataclass(frozen=True)
class Buckets:
    """Elements of ZeRO's buffers, by their names in DeepSpeed's configuration; its defaults."""

    reduce_bucket_size: int = 500_000_000
    """ZeRO 2 and 3; ZeRO 1 in fp32."""
    stage3_prefetch_bucket_size: int = 50_000_000
    stage3_max_live_parameters: int = 1_000_000_000


DEFAULT_BUCKETS = Buckets()


@dataclass(frozen=True)
class EngineMemory:
    """Bytes on one rank, by kind."""

    parameters: float
    gradients: float
    optimizer: float
    """Master weights and Adam's two moments."""
    buffers: float
    """Communication buckets, and parameters that ZeRO 3 has gathered."""
    at_step: float
    """Held beyond that between the last backward pass and the end of the optimizer step, when nothing is saved for
    backward any more."""
    made_anew: float
    """Of the gradients, those that the first backward pass of a step makes."""

    @property
    def weights(self) -> float:
        """What belongs to the weights, and grows with them."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """What is always there."""
        return self.weights + self.buffers


def engine_memory(
    parameters: float,
    trained: Sequence[float],
    *,
    bf16: bool,
    zero_stage: int,
    replicas: int,
    buckets: Buckets = DEFAULT_BUCKETS,
) -> EngineMemory:
    """Memory of a rank's weights and what belongs to them.

    Args:
        parameters: on this rank before ZeRO splits them, frozen ones included.
        trained: of these, the trained ones, by group of the optimizer, in order.
        bf16: bf16 with fp32 master weights; otherwise fp32.
        zero_stage: 0 to 3.
        replicas: ranks with the same weights, data times context.
        buckets: sizes of ZeRO's buffers.
    """
    element = 2 if bf16 else 4
    whole = sum(trained)
    share = whole / replicas
    reduce = 1.0 * buckets.reduce_bucket_size
    match zero_stage:
        case 0:
            # Gradients are copied into a buffer that is reduced.
            return EngineMemory(
                parameters=4 * parameters,
                gradients=4 * whole,
                optimizer=8 * whole,
                buffers=0.0,
                at_step=4.0 * min(whole, _ALL_REDUCE),
                made_anew=4 * whole,
            )
        case 1 if bf16:
            return EngineMemory(
                parameters=2 * parameters,
                gradients=6 * whole,
                optimizer=12 * share,
                buffers=0.0,
                at_step=_reduced_groups(trained),
                made_anew=2 * whole,
            )
        case 1:
            return EngineMemory(
                parameters=4 * parameters,
                gradients=4 * whole,
                optimizer=12 * share,
                buffers=4 * reduce,
                at_step=4 * share,
                made_anew=4 * whole,
            )
        case 2:
            # Beside the sum, the last micro-batch's share: in the weights' dtype from its backward pass on (a little
            # more, for parameters that lie on two ranks are copied whole), and then in fp32.
            return EngineMemory(
                parameters=element * parameters,
                gradients=4 * share,
                optimizer=12 * share,
                buffers=element * (reduce + share),
                at_step=4 * share,
                made_anew=4 * share,
            )
        case _:
            # What is gathered ahead arrives in one buffer and is copied from there, parameter by parameter.
            ahead = buckets.stage3_prefetch_bucket_size
            live = min(parameters, buckets.stage3_max_live_parameters + ahead) + min(parameters, ahead)
            return EngineMemory(
                parameters=element * parameters / replicas,
                gradients=4 * share,
                optimizer=12 * share,
                buffers=element * (reduce + live),
                at_step=4 * min(share, _SUB_GROUP),
                made_anew=0.0,
            )


def _reduced_groups(groups: Sequence[float]) -> float:
    """Bytes of the copies in which ZeRO 1 in bf16 reduces the fp32 gradients: group after group, until there are more
    than `_ALL_REDUCE` elements, which are then joined in fp32, if they are several groups, and rounded to bf16."""
    most, elements, joined = 0.0, 0.0, 0
    for group in groups:
        elements, joined = elements + group, joined + 1
        most = max(most, (6 if joined > 1 else 2) * elements)
        if elements > _ALL_REDUCE:
            elements, joined = 0.0, 0
    return most
