"""Bytes that DeepSpeed holds for a rank's weights, as DeepSpeed 0.19 is configured by `training/deepspeed_config.py`.

Per parameter (all) and per trained parameter, z ranks with the same weights:

    bf16, ZeRO 0   autocast: fp32 weights 4 and their bf16 copies 2; gradients 4; Adam 8
    bf16, ZeRO 1   BF16_Optimizer: weights 2; gradients 2 of the last micro-batch and 4 accumulated, both whole;
                   (master weights 4 + Adam 8) / z
    bf16, ZeRO 2   weights 2; accumulated gradients 4 / z; (4 + 8) / z
    bf16, ZeRO 3   weights 2 / z; accumulated gradients 4 / z; (4 + 8) / z
    fp32           4 in place of every 2, gradients once; ZeRO keeps a master copy even then

With an offloaded optimizer master weights, moments and the gradients that it reads are the host's, and in bf16 ZeRO 1
is no longer BF16_Optimizer. What the device keeps of the gradients:

    ZeRO 1         4 accumulated, whole; in bf16 their sum over the ranks, 4 / z, beside them
    ZeRO 2         4 / z: in bf16 accumulated here, in fp32 of the last micro-batch only and accumulated on the host
    ZeRO 3         nothing: accumulated on the host

Offloaded parameters are the host's but for what is gathered. Left out: the buffers of the largest parameter's size that
ZeRO 1 and 2 copy through, one on the device and one on the host.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# Elements. `reduce_bucket_size` (ZeRO 2 and 3; ZeRO 1 in fp32) and `stage3_max_live_parameters` +
# `stage3_prefetch_bucket_size`, DeepSpeed's defaults.
REDUCE_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_050_000_000
# ZeRO 3 updates its share in groups of at most `sub_group_size` parameters.
_SUB_GROUP = 1_000_000_000


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
    host: float = 0.0
    """In the host's memory, if something is offloaded; not part of the sums below."""

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
    trained: float,
    *,
    bf16: bool,
    zero_stage: int,
    replicas: int,
    offload_optimizer: bool = False,
    offload_param: bool = False,
) -> EngineMemory:
    """Memory of a rank's weights and what belongs to them.

    Args:
        parameters: on this rank before ZeRO splits them, frozen ones included.
        trained: of these, the trained ones.
        bf16: bf16 with fp32 master weights; otherwise fp32.
        zero_stage: 0 to 3.
        replicas: ranks with the same weights, data times context.
        offload_optimizer: master weights and optimizer state are on the host; needs ZeRO.
        offload_param: parameters are on the host; needs ZeRO 3.
    """
    on_device = _without_offload(parameters, trained, bf16=bf16, zero_stage=zero_stage, replicas=replicas)
    element = 2 if bf16 else 4
    share = trained / replicas
    if offload_optimizer:
        match zero_stage:
            case 1:
                # The bucket has the dtype of the accumulated gradients.
                gradients, buffers = 4 * trained + (4 * share if bf16 else 0), 4.0 * REDUCE_BUCKET
            case 2:
                gradients, buffers = 4 * share, on_device.buffers
            case _:
                gradients, buffers = 0.0, on_device.buffers
        # What the optimizer reads, beside it: ZeRO 1 and 2 a copy of the new weights on their way back, ZeRO 2 in fp32
        # and ZeRO 3 the accumulated gradients.
        way_back = element if zero_stage < 3 else 0
        accumulated = 4 if zero_stage == 3 or (zero_stage == 2 and not bf16) else 0
        on_device = replace(
            on_device,
            gradients=gradients,
            optimizer=0.0,
            buffers=buffers,
            at_step=0.0,
            host=on_device.optimizer + (4 + way_back + accumulated) * share,
        )
    if offload_param:
        on_device = replace(on_device, parameters=0.0, host=on_device.host + on_device.parameters)
    return on_device


def _without_offload(parameters: float, trained: float, *, bf16: bool, zero_stage: int, replicas: int) -> EngineMemory:
    element = 2 if bf16 else 4
    share = trained / replicas
    live = min(parameters, LIVE_PARAMETERS)
    match zero_stage:
        case 0:
            return EngineMemory((6 if bf16 else 4) * parameters, 4 * trained, 8 * trained, 0.0, 0.0)
        case 1 if bf16:
            # The accumulated gradients are reduced as one bf16 copy.
            return EngineMemory(2 * parameters, 6 * trained, 12 * share, 0.0, 2 * trained)
        case 1:
            return EngineMemory(4 * parameters, 4 * trained, 12 * share, 4.0 * REDUCE_BUCKET, 4 * share)
        case 2:
            # The last micro-batch's share in the weights' dtype and in fp32 beside the sum.
            return EngineMemory(
                element * parameters, 4 * share, 12 * share, 1.0 * element * REDUCE_BUCKET, (element + 4) * share
            )
        case _:
            return EngineMemory(
                element * parameters / replicas,
                4 * share,
                12 * share,
                1.0 * element * (REDUCE_BUCKET + live),
                4 * min(share, _SUB_GROUP),
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
            # Copied to a bucket, reduced, and a share of it added.
            return (2 * element + add / replicas) * trained
