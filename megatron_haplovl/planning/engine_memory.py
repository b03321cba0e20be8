"""Bytes that DeepSpeed holds for a rank's weights, as DeepSpeed 0.19 is configured by `engine/deepspeed_config.py`.

Bytes per parameter (weights) and per trained parameter (all else); z ranks have the same weights:

    bf16, ZeRO 0   autocast: fp32 weights 4; gradients 4; Adam 8. Every forward pass makes bf16 copies anew, and they
                   belong to what it keeps (`planning/cost.py`)
    bf16, ZeRO 1   BF16_Optimizer: weights 2; gradients 2 of the last micro-batch and 4 accumulated, both whole;
                   (master weights 4 + Adam 8) / z
    bf16, ZeRO 2   weights 2; accumulated gradients 4 / z; (4 + 8) / z
    bf16, ZeRO 3   weights 2 / z; accumulated gradients 4 / z; (4 + 8) / z
    fp32           4 in place of every 2, gradients once; ZeRO keeps a master copy even then

An offloaded optimizer has its master weights, its moments and the gradients that it reads on the host, and in bf16
ZeRO 1 is no longer BF16_Optimizer. The device keeps these gradients:

    ZeRO 1         4 accumulated, whole; in bf16 their sum over the ranks, 4 / z, beside them
    ZeRO 2         4 / z: in bf16 accumulated here, in fp32 of the last micro-batch only and accumulated on the host
    ZeRO 3         nothing: accumulated on the host

Offloaded parameters are on the host, except those that are gathered. Not counted: the buffers of the largest
parameter's size that ZeRO 1 and 2 copy through, one on the device and one on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

# Elements that ZeRO 0, and ZeRO 1 in bf16, reduce at a time (`MEMORY_OPT_ALLREDUCE_SIZE`). Not a setting.
_ALL_REDUCE = 500_000_000
# ZeRO 3 updates its share in groups of at most `sub_group_size` parameters.
_SUB_GROUP = 1_000_000_000


@dataclass(frozen=True)
class Buckets:
    """Elements of ZeRO's buffers, under DeepSpeed's names and with its defaults."""

    reduce_bucket_size: int = 500_000_000
    """Used by ZeRO 2 and 3, and by ZeRO 1 in fp32."""
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
    """What is held beyond that from the last backward pass to the end of the optimizer step, when nothing is saved for
    backward any more."""
    made_anew: float
    """The part of the gradients that the first backward pass of a step makes."""
    host: float = 0.0
    """Bytes in the host's memory, if something is offloaded; not part of the sums below."""

    @property
    def weights(self) -> float:
        """Bytes of all that belongs to the weights and grows with them."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """Bytes that are always held."""
        return self.weights + self.buffers


def engine_memory(
    parameters: float,
    trained: Sequence[float],
    *,
    bf16: bool,
    zero_stage: int,
    replicas: int,
    offload_optimizer: bool = False,
    offload_param: bool = False,
    buckets: Buckets = DEFAULT_BUCKETS,
) -> EngineMemory:
    """Memory of a rank's weights and what belongs to them.

    Args:
        parameters: parameters on this rank before ZeRO splits them, frozen ones included.
        trained: the trained ones among them, one number for each group of the optimizer, in order.
        bf16: bf16 with fp32 master weights; otherwise fp32.
        zero_stage: 0 to 3.
        replicas: ranks with the same weights, data times context.
        offload_optimizer: master weights and optimizer state are on the host; needs ZeRO.
        offload_param: parameters are on the host; needs ZeRO 3.
        buckets: sizes of ZeRO's buffers.
    """
    on_device = _without_offload(
        parameters, trained, bf16=bf16, zero_stage=zero_stage, replicas=replicas, buckets=buckets
    )
    element = 2 if bf16 else 4
    whole = sum(trained)
    share = whole / replicas
    reduce = 1.0 * buckets.reduce_bucket_size
    if offload_optimizer:
        match zero_stage:
            case 1:
                # The bucket has the dtype of the accumulated gradients.
                gradients, buffers = 4 * whole + (4 * share if bf16 else 0), 4 * reduce
            case 2:
                gradients, buffers = 4 * share, element * reduce
            case _:
                gradients, buffers = 0.0, on_device.buffers
        # The host also holds what the optimizer reads, in ZeRO 1 and 2 a copy of the new weights on their way back, and
        # in ZeRO 3 and in ZeRO 2 with fp32 the accumulated gradients.
        way_back = element if zero_stage < 3 else 0
        accumulated = 4 if zero_stage == 3 or (zero_stage == 2 and not bf16) else 0
        on_device = replace(
            on_device,
            gradients=gradients,
            optimizer=0.0,
            buffers=buffers,
            at_step=0.0,
            made_anew=0.0,
            host=on_device.optimizer + (4 + way_back + accumulated) * share,
        )
    if offload_param:
        on_device = replace(on_device, parameters=0.0, host=on_device.host + on_device.parameters)
    return on_device


def _without_offload(
    parameters: float, trained: Sequence[float], *, bf16: bool, zero_stage: int, replicas: int, buckets: Buckets
) -> EngineMemory:
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
            # The last micro-batch's share is held beside the sum, in the weights' dtype from its backward pass on (a
            # little more, because parameters that lie on two ranks are copied whole), and then in fp32.
            return EngineMemory(
                parameters=element * parameters,
                gradients=4 * share,
                optimizer=12 * share,
                buffers=element * (reduce + share),
                at_step=4 * share,
                made_anew=4 * share,
            )
        case _:
            # Parameters that are gathered ahead arrive in one buffer and are copied from there one by one.
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


def gradient_traffic(trained: float, *, bf16: bool, zero_stage: int, replicas: int) -> float:
    """Bytes that a rank reads and writes in every micro-batch to add its gradients to those of the ones before.

    Args:
        trained: trained parameters on this rank before ZeRO splits them.
        bf16, zero_stage, replicas: as in :func:`engine_memory`.
    """
    element = 2 if bf16 else 4
    add = element + 2 * 4  # The sum is fp32.
    match zero_stage:
        case 0 if bf16:
            # Autocast makes bf16 copies of the weights, and the copies' gradients fp32.
            return (2 * (4 + 2) + 3 * 4) * trained
        case 0 | 1:
            return add * trained
        case _:
            # Gradients are copied to a bucket and reduced, and a share of it is added.
            return (2 * element + add / replicas) * trained


def _reduced_groups(groups: Sequence[float]) -> float:
    """Bytes of the copies in which ZeRO 1 in bf16 reduces the fp32 gradients.

    It collects group after group until there are more than `_ALL_REDUCE` elements, joins them in fp32 if they are
    several groups, and rounds them to bf16.
    """
    most, elements, joined = 0.0, 0.0, 0
    for group in groups:
        elements, joined = elements + group, joined + 1
        most = max(most, (6 if joined > 1 else 2) * elements)
        if elements > _ALL_REDUCE:
            elements, joined = 0.0, 0
    return most
