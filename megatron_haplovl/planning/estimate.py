"""What one layout would do on a cluster: the stage cut, memory by kind, messages by kind, time of a step.

Nothing here was measured on a GPU. The caller says which rates the machine reaches. The memory kept for backward is
counted from the code (`planning/cost.py`), DeepSpeed's from its source (`planning/engine_memory.py`).
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import pairwise

from megatron_haplovl.config.layout import Layout, Workload
from megatron_haplovl.config.stages import PART_OF
from megatron_haplovl.planning.cost import layer_costs, model_operations
from megatron_haplovl.planning.cost_units import LayerCost, precision_of
from megatron_haplovl.planning.engine_memory import DEFAULT_BUCKETS, Buckets, EngineMemory, engine_memory
from megatron_haplovl.planning.machine import Cluster
from megatron_haplovl.planning.partition import cut_layers, in_flight, stage_sums
from megatron_haplovl.planning.stage_cut import layer_loads
from megatron_haplovl.planning.work import Work

# Parts that may train, in the order of the optimizer's groups.
_PARTS = tuple(dict.fromkeys(reversed(list(PART_OF.values()))))


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank."""

    engine: EngineMemory
    activations: float
    """Bytes kept for backward by all micro-batches in flight."""
    working: float
    """What a backward pass holds beyond that at its worst moment; if that is in a step's first pass, less the gradients
    that do not exist yet."""
    teacher: float
    """Stage 1's vision teacher."""
    messages: float
    """Buffers that DeepSpeed's pipeline receives into, and what it forgets to give back."""

    @property
    def peak(self) -> float:
        """The most there ever is: in a backward pass, or in the optimizer step."""
        always = self.engine.total + self.teacher + self.messages
        return always + max(self.activations + self.working, self.engine.at_step)


@dataclass(frozen=True)
class Estimate:
    """What is expected of one layout."""

    layout: Layout
    cut: tuple[int, ...]
    first_layers: tuple[str, ...]
    stage_seconds: tuple[float, ...]
    """Forward and backward of one micro-batch, messages included."""
    micro_batches: int
    stage_memories: tuple[RankMemory, ...]
    bubble: float
    """Share of the step's pipelined part in which the mean stage waits until others fill, drain or catch up."""
    imbalance: float
    """Seconds of the slowest stage over those of the mean stage, less one."""
    tensor_bytes: float
    """Bytes that a rank of the busiest stage sends per step; the same for the next three."""
    context_bytes: float
    pipeline_bytes: float
    data_bytes: float
    step_seconds: float
    mfu: float

    @property
    def fullest_stage(self) -> int:
        """The stage whose ranks need most memory."""
        return max(range(len(self.stage_memories)), key=lambda stage: self.stage_memories[stage].peak)

    @property
    def memory(self) -> RankMemory:
        """Memory of the fullest stage."""
        return self.stage_memories[self.fullest_stage]


def estimate(
    workload: Workload,
    work: Work,
    layout: Layout,
    cluster: Cluster,
    *,
    trained: Set[str],
    bf16: bool,
    partition: str = "auto",
    device: str = "cuda",
    buckets: Buckets = DEFAULT_BUCKETS,
) -> Estimate:
    """Estimate one layout that `config.layout.check_layout` allows.

    Args:
        workload: model, sequence length, batch, stage.
        work: one packed sequence.
        layout: the layout.
        cluster: the machine.
        trained: parts that are trained.
        bf16: bf16 with fp32 master weights; otherwise fp32.
        partition: see `planning.partition.cut_layers`.
        device: `cuda` or `cpu`; the chunked loss takes larger chunks on a GPU.
        buckets: sizes of ZeRO's buffers.
    """
    costs = layer_costs(
        workload.model,
        work * layout.micro_batch_size,
        layout,
        precision_of(bf16, layout.zero_stage, device),
        trained=trained,
        stage=workload.stage,
    )
    micro_batches = workload.micro_batches(layout)
    loads = layer_loads(costs, layout, cluster, bf16)
    cut = cut_layers(partition, loads, layout.pipeline, micro_batches)
    stages = [costs[first:end] for first, end in pairwise((*cut, len(costs)))]

    data_seconds = [_data_seconds(stage, layout, cluster, bf16, micro_batches) for stage in stages]
    busy = stage_sums([layer.seconds for layer in loads], cut)
    for stage in range(layout.pipeline):
        busy[stage] += _boundary_bytes(stages, stage) / cluster.bandwidth(
            layout.tensor * layout.replicas, layout.pipeline
        )
        if layout.zero_stage == 3:
            messages = data_seconds[stage] / micro_batches
            hidden = cluster.overlap * messages
            busy[stage] = max(busy[stage], hidden) + messages - hidden
    pipelined = pipeline_seconds(busy, micro_batches)
    exposed = 0.0 if layout.zero_stage == 3 else max(data_seconds)
    host = max(_host_seconds(stage, layout, cluster, bf16, micro_batches) for stage in stages)
    step = pipelined + exposed + host + max(_update_seconds(stage, layout, cluster) for stage in stages)

    mean = sum(busy) / layout.pipeline
    operations = model_operations(workload.model, work, workload.stage) * workload.global_batch_size
    return Estimate(
        layout=layout,
        cut=cut,
        first_layers=tuple(costs[first].name for first in cut),
        stage_seconds=tuple(busy),
        micro_batches=micro_batches,
        stage_memories=tuple(
            _stage_memory(stages, i, layout, bf16, micro_batches, trained, buckets) for i in range(layout.pipeline)
        ),
        bubble=1.0 - micro_batches * mean / pipelined,
        imbalance=max(busy) / mean - 1.0,
        tensor_bytes=micro_batches * max(sum(layer.tensor_bytes for layer in stage) for stage in stages),
        context_bytes=micro_batches * max(sum(layer.context_bytes for layer in stage) for stage in stages),
        pipeline_bytes=micro_batches * max(_boundary_bytes(stages, i) for i in range(layout.pipeline)),
        data_bytes=max(_data_messages(stage, layout, bf16, micro_batches) for stage in stages),
        step_seconds=step,
        mfu=operations / (step * cluster.gpus * cluster.peak),
    )


def pipeline_seconds(stage_seconds: Sequence[float], micro_batches: int) -> float:
    """Forward and backward of all micro-batches on a 1F1B schedule: the first one passes through every stage, and each
    further one takes as long as the slowest stage."""
    return (micro_batches - 1) * max(stage_seconds) + sum(stage_seconds)


def most_held(stage: Sequence[LayerCost], gradient_bytes: float = 0.0) -> float:
    """Bytes that one micro-batch holds at the worst moment of its backward pass through a stage.

    In a layer's backward everything before the layer is still kept, and what came after it is gone.

    Args:
        stage: the layers of the stage.
        gradient_bytes: bytes per trained parameter of the gradients that this backward pass leaves behind.
    """
    tables = {layer.name.partition(".")[0]: layer.table_bytes for layer in stage}
    kept, most, behind = sum(layer.saved_bytes for layer in stage), 0.0, 0.0
    for layer in reversed(stage):
        most = max(most, kept + layer.working_bytes + behind)
        kept -= layer.saved_bytes
        behind += gradient_bytes * layer.trained_parameters
    return sum(tables.values()) + most


def kept_bytes(stage: Sequence[LayerCost]) -> float:
    """Bytes that one micro-batch in flight keeps on a stage."""
    tables = {layer.name.partition(".")[0]: layer.table_bytes for layer in stage}
    return sum(layer.saved_bytes for layer in stage) + sum(tables.values())


def _stage_memory(
    stages: Sequence[Sequence[LayerCost]],
    index: int,
    layout: Layout,
    bf16: bool,
    micro_batches: int,
    parts: Set[str],
    buckets: Buckets,
) -> RankMemory:
    stage = stages[index]
    alone = all(layer.name != "embedding" for layer in stage)
    engine = engine_memory(
        sum(layer.parameters + layer.copied_parameters * alone for layer in stage),
        _optimizer_groups(stage, parts),
        bf16=bf16,
        zero_stage=layout.zero_stage,
        replicas=layout.replicas,
        offload_optimizer=layout.offload_optimizer,
        offload_param=layout.offload_param,
        buckets=buckets,
    )
    # DeepSpeed's pipeline keeps what a stage received (beside a copy to work on) and what it sent until the gradient is
    # back. It receives into buffers of its own.
    received = stages[index - 1][-1].boundary_bytes if index > 0 else 0.0
    sent = stage[-1].boundary_bytes if index + 1 < len(stages) else 0.0
    kept = kept_bytes(stage)
    held, waiting = in_flight(index, len(stages), micro_batches), kept + received + sent
    working = most_held(stage) - kept
    if held == micro_batches:
        # Only the step's first backward pass meets so many micro-batches, and that pass makes the gradients.
        trained = max(1, sum(layer.trained_parameters for layer in stage))
        first = most_held(stage, engine.made_anew / trained) - engine.made_anew - kept
        if held == 1 or waiting + first > working:
            working = first
        else:
            held -= 1
    messages = received + sent
    if index + 1 == len(stages):
        # The losses of the last two micro-batches are kept with their graphs, which hold the hidden states that were
        # received and their gradients.
        messages += 2 * min(2, micro_batches) * received
    return RankMemory(
        engine=engine,
        activations=held * waiting,
        working=working,
        teacher=sum(layer.teacher_bytes for layer in stage),
        messages=messages,
    )


def _optimizer_groups(stage: Sequence[LayerCost], parts: Set[str]) -> list[float]:
    """Trained parameters of each group of the optimizer, in the order of `training.recipe.parameter_groups`. The
    vectors' groups count as empty. Every stage has every group."""
    sizes = dict.fromkeys((part for part in _PARTS if part in parts), 0.0)
    for layer in stage:
        if layer.trained_parameters:
            sizes[PART_OF[layer.name.partition(".")[0]]] += layer.trained_parameters
    return [*sizes.values(), *(0.0 for part in sizes if part != "connector")]


def _replica_bandwidth(layout: Layout, cluster: Cluster) -> float:
    """Bytes per second of a rank in a ring over the replicas. The ring crosses each node's border once for all of the
    node's members and uses the network adapters of all of them."""
    if layout.tensor * layout.replicas <= cluster.gpus_per_node:
        return cluster.intra_node
    members = max(1, cluster.gpus_per_node // layout.tensor)
    return min(cluster.intra_node, cluster.inter_node * members)


def _boundary_bytes(stages: Sequence[Sequence[LayerCost]], index: int) -> float:
    """Bytes that a stage sends per micro-batch: hidden states to the next stage, their gradient to the one before."""
    forward = stages[index][-1].boundary_bytes if index + 1 < len(stages) else 0.0
    backward = stages[index - 1][-1].boundary_bytes if index > 0 else 0.0
    return forward + backward


def _data_messages(stage: Sequence[LayerCost], layout: Layout, bf16: bool, micro_batches: int) -> float:
    """Bytes that a rank sends per step so that the replicas agree: gradients, and parameters if ZeRO has split them.

    A ring's all-gather or reduce-scatter sends (z - 1) / z of the tensor, an all-reduce twice that. ZeRO 2 reduces
    whole buckets in every micro-batch (DeepSpeed's `use_multi_rank_bucket_allreduce`).
    """
    parameters = sum(layer.parameters for layer in stage)
    trained = sum(layer.trained_parameters for layer in stage)
    element = 2 if bf16 else 4
    match layout.zero_stage:
        case 0:
            whole = 2 * 4 * trained
        case 1:
            whole = 2 * element * trained + element * trained
        case 2:
            whole = micro_batches * 2 * element * trained + element * trained
        case _:
            whole = micro_batches * element * (2 * parameters + trained)
    return whole * (layout.replicas - 1) / layout.replicas


def _data_seconds(
    stage: Sequence[LayerCost], layout: Layout, cluster: Cluster, bf16: bool, micro_batches: int
) -> float:
    """Seconds that these messages take per step, by their bytes and by the length of the ring."""
    if layout.replicas == 1:
        return 0.0
    match layout.zero_stage:
        case 0 | 1:
            passes = 3.0
        case 2:
            buckets = 1 + sum(layer.trained_parameters for layer in stage) // DEFAULT_BUCKETS.reduce_bucket_size
            passes = 1.0 + 2 * micro_batches * buckets
        case _:
            passes = 3.0 * micro_batches * len(stage)  # Every layer is gathered twice and reduced once.
    sent = _data_messages(stage, layout, bf16, micro_batches)
    return sent / _replica_bandwidth(layout, cluster) + passes * cluster.ring_latency(layout.tensor, layout.replicas)


def _update_seconds(stage: Sequence[LayerCost], layout: Layout, cluster: Cluster) -> float:
    """AdamW reads weights, gradients and both moments and writes all but the gradients, in fp32, and bf16 weights."""
    trained = sum(layer.trained_parameters for layer in stage)
    bandwidth = cluster.host_memory if layout.offload_optimizer else cluster.speeds.memory
    return 30 * trained / (layout.replicas if layout.zero_stage else 1) / bandwidth


def _host_seconds(
    stage: Sequence[LayerCost], layout: Layout, cluster: Cluster, bf16: bool, micro_batches: int
) -> float:
    """Seconds per step in which what is offloaded moves between host and device.

    Gradients go to an offloaded optimizer in fp32, once per step. ZeRO 3, and ZeRO 2 in fp32, accumulate them on the
    host but add on the device, so each micro-batch also sends the sum back and forth. New weights move unless the
    parameters lie where the optimizer is. Offloaded parameters come twice per micro-batch, when they are gathered.
    """
    element = 2 if bf16 else 4
    parameters = sum(layer.parameters for layer in stage) / layout.replicas
    trained = sum(layer.trained_parameters for layer in stage) / layout.replicas
    moved = 0.0
    if layout.offload_optimizer:
        host_accumulates = layout.zero_stage == 3 or (layout.zero_stage == 2 and not bf16)
        moved += 4 * trained * (1 + 2 * micro_batches * host_accumulates)
    if layout.offload_optimizer != layout.offload_param:
        moved += element * trained
    if layout.offload_param:
        moved += 2 * micro_batches * element * parameters
    return moved / cluster.host_link
