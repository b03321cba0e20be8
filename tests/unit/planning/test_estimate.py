"""Step times against a simulation of DeepSpeed's schedule; memory and messages of a layout against sums by hand."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, TrainSchedule

from megatron_haplovl.config.layout import Layout, Workload
from megatron_haplovl.config.presets import MODELS
from megatron_haplovl.config.stages import FINETUNE
from megatron_haplovl.data.image_geometry import Picture, visual_layouts
from megatron_haplovl.planning.cost import layer_costs
from megatron_haplovl.planning.cost_units import Precision, Speeds
from megatron_haplovl.planning.estimate import Estimate, estimate, pipeline_seconds
from megatron_haplovl.planning.machine import Cluster
from megatron_haplovl.planning.work import work_of_sequence

TRAINED = frozenset({"embedding", "pre_decoder", "connector", "post_decoder"})
MODEL = MODELS["haplovl-8b"]
WORK = work_of_sequence(6144, visuals=visual_layouts([Picture(672, 672)], MODEL.vision), text=256, trained=128)
WORKLOAD = Workload(MODEL, seq_length=6144, global_batch_size=128)
CLUSTER = Cluster(
    gpus=64,
    gpus_per_node=8,
    memory=70e9,
    peak=1e15,
    speeds=Speeds(products=5e14, attention=3e14, memory=2e12),
    intra_node=3e11,
    inter_node=4e10,
    intra_hop=0.0,
    inter_hop=0.0,
    overlap=1.0,
    host_link=5e10,
    host_memory=2e10,
)


def of(layout: Layout, cluster: Cluster = CLUSTER, **settings: object) -> Estimate:
    cluster = dataclasses.replace(cluster, gpus=layout.ranks)
    return estimate(WORKLOAD, WORK, layout, cluster, trained=TRAINED, bf16=True, **settings)  # type: ignore[arg-type]


def simulate(stage_seconds: list[float], micro_batches: int) -> float:
    """The time when the last stage is done, if every stage runs DeepSpeed's commands in order and messages take none.

    A third of a stage's time is forward.
    """
    stages = len(stage_seconds)
    todo = [
        [
            command
            for commands in TrainSchedule(micro_batches, stages, stage).steps()
            for command in commands
            if isinstance(command, ForwardPass | BackwardPass)
        ]
        for stage in range(stages)
    ]
    clock = [0.0] * stages
    forward_done: dict[Any, float] = {}
    backward_done: dict[Any, float] = {}
    counts = [[0, 0] for _ in range(stages)]
    while any(todo):
        for stage in range(stages):
            while todo[stage]:
                forward = isinstance(todo[stage][0], ForwardPass)
                micro = counts[stage][0 if forward else 1]
                if forward:
                    ready = 0.0 if stage == 0 else forward_done.get((stage - 1, micro))
                else:
                    ready = (
                        forward_done.get((stage, micro))
                        if stage == stages - 1
                        else backward_done.get((stage + 1, micro))
                    )
                if ready is None:
                    break
                clock[stage] = max(clock[stage], ready) + stage_seconds[stage] * (1 if forward else 2) / 3
                (forward_done if forward else backward_done)[stage, micro] = clock[stage]
                counts[stage][0 if forward else 1] += 1
                todo[stage].pop(0)
    return max(clock)


def test_pipeline_time_of_equal_stages_is_the_schedules() -> None:
    for stages in (1, 2, 4, 8):
        for micro_batches in (1, 3, 8, 32):
            expected = simulate([1.0] * stages, micro_batches)
            assert pipeline_seconds([1.0] * stages, micro_batches) == pytest.approx(expected)


@pytest.mark.parametrize(("spread", "tolerance"), [(0.05, 0.02), (0.2, 0.1)])
def test_pipeline_time_of_unequal_stages_is_close_to_the_schedules(spread: float, tolerance: float) -> None:
    generator, worst = random.Random(0), 0.0
    for _ in range(100):
        seconds = [generator.uniform(1.0 - spread, 1.0 + spread) for _ in range(generator.choice((2, 4, 8)))]
        micro_batches = generator.choice((8, 16, 64))
        worst = max(worst, abs(pipeline_seconds(seconds, micro_batches) / simulate(seconds, micro_batches) - 1.0))
    # Never too little. Measured: 1.7 % and 6.7 %, both with eight stages and eight micro-batches.
    assert worst < tolerance, worst


def test_bubble_of_equal_stages() -> None:
    plan = of(Layout(pipeline=4, zero_stage=1))
    assert plan.micro_batches == 128
    busy = plan.stage_seconds
    share = 1.0 - 128 * sum(busy) / 4 / pipeline_seconds(busy, 128)
    assert plan.bubble == pytest.approx(share)
    assert plan.imbalance == pytest.approx(max(busy) / (sum(busy) / 4) - 1.0)
    assert plan.cut[0] == 0 and len(plan.first_layers) == 4 and plan.first_layers[0] == "embedding"


def test_memory_of_the_fullest_stage_by_hand() -> None:
    layout = Layout(tensor=2, pipeline=3, data=2, zero_stage=1, sequence_parallel=True)
    plan = of(layout)
    layers = layer_costs(MODEL, WORK, layout, Precision(), trained=TRAINED, stage=FINETUNE)
    ends = [*plan.cut[1:], len(layers)]
    peaks = []
    for stage, (first, end) in enumerate(zip(plan.cut, ends, strict=True)):
        mine = layers[first:end]
        weights = sum(layer.parameters for layer in mine)
        # bf16 weights and gradients, fp32 accumulated gradients, and over two replicas master weights and moments.
        static = weights * (2 + 2 + 4 + 12 / 2)
        decoders = {layer.name.split(".")[0] for layer in mine} & {"pre_decoder", "post_decoder"}
        tables = sum(2 * 2 * {"pre_decoder": 64, "post_decoder": 128}[part] * 6144 for part in decoders)
        sent = layers[end - 1].boundary_bytes if stage < 2 else 0
        received = layers[first - 1].boundary_bytes if stage > 0 else 0
        # One buffer, if it is large enough for both, and behind the last loss two micro-batches' inputs with gradients.
        static += received + (sent if sent > received else 0) + (4 * received if stage == 2 else 0)
        saved = [layer.saved_bytes for layer in mine]
        waiting = (3 - stage - 1) * (sum(saved) + tables) + (3 - stage) * (sent + received)
        worst = tables + max(sum(saved[: i + 1]) + mine[i].working_bytes for i in range(len(mine)))
        # The gradients are reduced in bf16 when nothing is in flight any more: the post-decoder's alone if they are
        # more than 500 M, otherwise those of all parts, joined in fp32 first.
        post = sum(layer.parameters for layer in mine if layer.name[:4] in ("post", "fina", "lm_h"))
        reduced = max(2 * post, 6 * (weights - post)) if post > 5e8 else 6 * weights
        peaks.append(static + max(waiting + worst, reduced))
    assert plan.memory.peak == pytest.approx(max(peaks))
    assert plan.fullest_stage == peaks.index(max(peaks))


def test_gradients_are_not_there_in_the_first_of_few_backward_passes() -> None:
    """Stage 0 of two holds two micro-batches. With two per step it does so before it has any gradient."""
    few, many = (
        estimate(
            dataclasses.replace(WORKLOAD, global_batch_size=micro_batches),
            WORK,
            Layout(pipeline=2, zero_stage=1),
            dataclasses.replace(CLUSTER, gpus=2),
            trained=TRAINED,
            bf16=True,
            partition="post_decoder.16",
        ).stage_memories[0]
        for micro_batches in (2, 4)
    )
    assert few.engine == many.engine
    kept = many.activations / 2
    # In the first pass bf16 gradients are missing; in the second, one micro-batch.
    assert few.activations + few.working <= many.activations + many.working
    assert few.peak >= many.engine.total + max(kept + many.working, few.engine.at_step)


@pytest.mark.parametrize(
    ("zero_stage", "per_step", "per_micro_batch"),
    [
        (0, 2 * 4, 0),  # All-reduce of fp32 gradients.
        (1, 2 * 2 + 2, 0),  # All-reduce in bf16, gather of bf16 weights.
        (2, 2, 2 * 2),  # All-reduced in every micro-batch.
        (3, 0, 3 * 2),  # Two gathers, one reduce-scatter.
    ],
)
def test_data_parallel_messages_by_hand(zero_stage: int, per_step: int, per_micro_batch: int) -> None:
    plan = of(Layout(data=8, zero_stage=zero_stage))
    weights = sum(
        layer.parameters for layer in layer_costs(MODEL, WORK, Layout(), Precision(), trained=TRAINED, stage=FINETUNE)
    )
    assert plan.data_bytes == pytest.approx((per_step + 16 * per_micro_batch) * weights * 7 / 8)


def test_step_time_adds_up() -> None:
    alone = of(Layout(data=1, zero_stage=1))
    layers = layer_costs(MODEL, WORK, Layout(), Precision(), trained=TRAINED, stage=FINETUNE)
    update = 30 * sum(layer.parameters for layer in layers) / 2e12
    # bf16 gradients are read and added to fp32 sums.
    adding = (2 + 2 * 4) * sum(layer.parameters for layer in layers) / 2e12
    compute = sum(layer.seconds(CLUSTER.speeds) for layer in layers) + adding
    assert alone.step_seconds == pytest.approx(128 * compute + update)
    # Eight replicas of a node: an eighth of the micro-batches, and messages that nothing hides.
    eight = of(Layout(data=8, zero_stage=1))
    assert eight.step_seconds == pytest.approx(16 * compute + eight.data_bytes / 3e11 + update / 8)
    # 64 of them: rings cross each node's border once, over eight adapters that are together faster than NVLink here.
    many = of(Layout(data=64, zero_stage=1))
    assert many.step_seconds == pytest.approx(2 * compute + many.data_bytes / 3e11 + update / 64)
    narrow = of(Layout(data=64, zero_stage=1), dataclasses.replace(CLUSTER, inter_node=1e9))
    assert narrow.step_seconds == pytest.approx(2 * compute + narrow.data_bytes / 8e9 + update / 64)
    # ZeRO 3 hides what it can. It copies gradients to a bucket, and adds an eighth of them.
    hidden = of(Layout(data=8, zero_stage=3))
    compute += adding * ((2 * 2) / 10 + 1 / 8 - 1)
    assert hidden.data_bytes / 3e11 < 16 * compute
    assert hidden.step_seconds == pytest.approx(16 * compute + update / 8)
    bare = of(Layout(data=8, zero_stage=3), dataclasses.replace(CLUSTER, overlap=0.0))
    assert bare.step_seconds == pytest.approx(16 * compute + bare.data_bytes / 3e11 + update / 8)


def test_time_of_offload_by_hand() -> None:
    layers = layer_costs(MODEL, WORK, Layout(), Precision(), trained=TRAINED, stage=FINETUNE)
    share = sum(layer.parameters for layer in layers) / 8
    arithmetic = sum(layer.seconds(CLUSTER.speeds) for layer in layers)
    update = 30 * share / 2e10
    # fp32 gradients out, bf16 weights back.
    one = of(Layout(data=8, zero_stage=1, offload_optimizer=True))
    compute = arithmetic + 10 * 8 * share / CLUSTER.speeds.memory  # Gradients are added up in fp32.
    assert one.step_seconds == pytest.approx(16 * compute + one.data_bytes / 3e11 + (4 + 2) * share / 5e10 + update)
    # Each of 16 micro-batches sends the fp32 sum both ways, and bf16 weights twice.
    both = of(Layout(data=8, zero_stage=3, offload_optimizer=True, offload_param=True))
    compute = arithmetic + (4 * 8 + 10) * share / CLUSTER.speeds.memory  # Copied to a bucket, and a share added.
    assert both.step_seconds == pytest.approx(16 * compute + (4 * 33 + 2 * 2 * 16) * share / 5e10 + update)
    # The optimizer stays, and sends the weights.
    parameters = of(Layout(data=8, zero_stage=3, offload_param=True))
    assert parameters.step_seconds == pytest.approx(16 * compute + (2 + 2 * 2 * 16) * share / 5e10 + update / 100)


def test_memory_of_offload_by_hand() -> None:
    layers = layer_costs(MODEL, WORK, Layout(), Precision(), trained=TRAINED, stage=FINETUNE)
    weights = sum(layer.parameters for layer in layers)
    plain, optimizer, both = (
        of(Layout(data=8, zero_stage=3, offload_optimizer=optimizer, offload_param=param)).memory
        for optimizer, param in ((False, False), (True, False), (True, True))
    )
    assert plain.engine.weights - optimizer.engine.weights == pytest.approx((4 + 12) * weights / 8)
    assert optimizer.engine.weights - both.engine.weights == pytest.approx(2 * weights / 8)
    assert plain.engine.host == 0.0
    assert both.engine.host == pytest.approx((4 + 4 + 12 + 2) * weights / 8)
    assert both.peak < optimizer.peak < plain.peak


def test_latency_of_rings() -> None:
    slow = dataclasses.replace(CLUSTER, intra_hop=1.0, inter_hop=100.0)
    # Two all-reduces, of two passes each, forward and backward of every block; 2 hops per ring pass.
    tensor = (
        of(Layout(tensor=4, data=1, zero_stage=1), slow).step_seconds - of(Layout(tensor=4, zero_stage=1)).step_seconds
    )
    blocks, ends = 56, 6  # Embedding 3, connector 2, head 1.
    assert tensor == pytest.approx(128 * (4 * blocks + ends) * 2 * 3)
    # Two hops of a ring of 16 replicas on two nodes cross nodes; gradients go around twice, weights once.
    data = of(Layout(data=16, zero_stage=1), slow).step_seconds - of(Layout(data=16, zero_stage=1)).step_seconds
    assert data == pytest.approx(3 * (2 * 100.0 + 13 * 1.0))


def test_model_flops_utilisation() -> None:
    plan = of(Layout(data=8, zero_stage=1))
    # 6 operations per weight and token without the embedding's lookup; attention has 12 per pair and channel.
    blocks = 24 * 12 * 1024**2 + 32 * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336) + 2 * 4096 * 1024
    products = 6 * (blocks * 6144 + 128256 * 4096 * 256 + 588 * 1024 * 4608)
    attention = 12 * WORK.pairs * (24 * 1024 + 32 * 4096)
    assert plan.mfu == pytest.approx(128 * (products + attention) / (plan.step_seconds * 8 * 1e15))
