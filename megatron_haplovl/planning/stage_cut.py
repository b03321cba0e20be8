"""From a model and the work in its batches to the cut of its pipeline, for the training and the planner alike."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

from megatron_haplovl.config.layout import Layout
from megatron_haplovl.config.schema import ModelConfig
from megatron_haplovl.config.stages import StageSpec
from megatron_haplovl.planning.cost import layer_costs
from megatron_haplovl.planning.cost_units import LayerCost, precision_of
from megatron_haplovl.planning.engine_memory import engine_memory, gradient_traffic
from megatron_haplovl.planning.machine import Machine, machine_of
from megatron_haplovl.planning.partition import LayerLoad, cut_layers
from megatron_haplovl.planning.work import Work


def stage_cut(
    model: ModelConfig,
    work: Work,
    layout: Layout,
    *,
    device: str,
    bf16: bool,
    trained: Set[str],
    stage: StageSpec,
    method: str,
    micro_batches: int,
) -> tuple[list[str], tuple[int, ...]]:
    """Cut the flat layer list into `layout.pipeline` stages.

    Args:
        model: sizes.
        work: one micro-batch of all ranks that share it; the average of real ones, the same on every rank.
        layout: how ranks share the work.
        device: `cuda` or `cpu`, see `planning.machine.machine_of`.
        bf16: bf16 with fp32 master weights; otherwise fp32.
        trained: parts that are trained, as `training.recipe.trained_parts` names them.
        stage: the training's stage, which decides the layers.
        method: `--pipeline-partition`, see `planning.partition.cut_layers`.
        micro_batches: micro-batches per optimizer step.

    Returns:
        Names of the flat list's layers, and the first layer of every stage.

    Raises:
        ValueError: more stages than layers, an explicit cut that does not fit, or an unknown device.
    """
    machine = machine_of(device, bf16)
    precision = precision_of(bf16, layout.zero_stage, device)
    costs = layer_costs(model, work, layout, precision, trained=trained, stage=stage)
    loads = layer_loads(costs, layout, machine, bf16)
    return [layer.name for layer in costs], cut_layers(method, loads, layout.pipeline, micro_batches)


def layer_loads(costs: Sequence[LayerCost], layout: Layout, machine: Machine, bf16: bool) -> list[LayerLoad]:
    """What decides a cut, for every layer of one rank."""
    engine: dict[str, Any] = {"bf16": bf16, "zero_stage": layout.zero_stage, "replicas": layout.replicas}
    return [
        LayerLoad(
            name=layer.name,
            seconds=layer.seconds(machine.speeds)
            + gradient_traffic(layer.trained_parameters, **engine) / machine.speeds.memory
            + _message_seconds(layer, layout, machine),
            trained_parameters=layer.trained_parameters,
            static_bytes=engine_memory(
                layer.parameters,
                [layer.trained_parameters],
                offload_optimizer=layout.offload_optimizer,
                offload_param=layout.offload_param,
                **engine,
            ).weights,
            saved_bytes=layer.saved_bytes,
        )
        for layer in costs
    ]


def _message_seconds(layer: LayerCost, layout: Layout, machine: Machine) -> float:
    """Seconds of the messages inside a layer, which nothing hides."""
    return (
        layer.tensor_bytes / machine.bandwidth(1, layout.tensor)
        + layer.tensor_collectives * 2 * machine.ring_latency(1, layout.tensor)
        + layer.context_bytes / machine.bandwidth(layout.tensor, layout.context)
    )
