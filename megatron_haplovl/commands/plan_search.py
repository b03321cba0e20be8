"""Every layout that `haplovl-plan` looks at: possible, with its costs, or refused, with the constraints that fail."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_haplovl.config.layout import Layout, Workload, check_layout
from megatron_haplovl.config.schema import RecipeConfig
from megatron_haplovl.planning.estimate import Estimate, estimate
from megatron_haplovl.planning.machine import GIB, Cluster
from megatron_haplovl.planning.work import Work
from megatron_haplovl.training.recipe import trained_parts

# Estimates are no finer than this: among the layouts as fast as the fastest, the one with most room is recommended.
_AS_FAST = 1.02


@dataclass(frozen=True)
class Found:
    """All layouts that were looked at."""

    possible: Sequence[Estimate]
    """Possible layouts, the fastest first."""
    refused: Sequence[tuple[Layout, dict[str, str]]]
    """Refused layouts, each with the constraints that fail: name -> sentence."""

    @property
    def recommended(self) -> Estimate | None:
        """The fastest layout; among several as fast, the one with most room."""
        if not self.possible:
            return None
        longest = _AS_FAST * self.possible[0].step_seconds
        return min((plan for plan in self.possible if plan.step_seconds <= longest), key=lambda plan: plan.memory.peak)


def search(
    arguments: argparse.Namespace, workload: Workload, work: Work, cluster: Cluster, recipe: RecipeConfig
) -> Found:
    """Estimate every layout.

    Args:
        arguments: the layouts to try, `bf16` and `pipeline_partition`.
        workload: model and batch.
        work: the work in one packed sequence.
        cluster: what it runs on.
        recipe: what is trained.
    """
    possible: list[Estimate] = []
    refused: list[tuple[Layout, dict[str, str]]] = []
    for layout in _layouts(arguments, workload):
        reasons = _refusals(layout, workload, cluster)
        if not reasons:
            try:
                plan = estimate(
                    workload,
                    work,
                    layout,
                    cluster,
                    trained=trained_parts(recipe),
                    bf16=arguments.bf16,
                    partition=arguments.pipeline_partition,
                )
            except ValueError as error:  # An explicit partition fits one number of stages only.
                refused.append((layout, {"partition": str(error)}))
                continue
            if plan.memory.peak <= cluster.memory:
                possible.append(plan)
                continue
            reasons = {"memory": _too_large(plan, cluster)}
        refused.append((layout, reasons))
    possible.sort(key=lambda plan: plan.step_seconds)
    return Found(possible, refused)


def _layouts(arguments: argparse.Namespace, workload: Workload) -> Iterator[Layout]:
    """Every layout to look at. A value that the user names is tried even if it is hopeless, to say why."""
    gpus = arguments.gpus
    divisors = [n for n in range(1, gpus + 1) if gpus % n == 0]
    tensor = arguments.tensor_model_parallel_size or [n for n in divisors if n <= arguments.gpus_per_node]
    pipeline = arguments.pipeline_model_parallel_size or [n for n in divisors if n <= workload.num_layers]
    context = arguments.context_parallel_size or [n for n in divisors if n <= workload.model.pre.num_attention_heads]
    for t, p, c in itertools.product(tensor, pipeline, context):
        if t < 1 or p < 1 or c < 1 or gpus % (t * p * c):
            named = (arguments.tensor_model_parallel_size, arguments.pipeline_model_parallel_size)
            if None in (*named, arguments.context_parallel_size):
                continue
        for zero, optimizer, param, recompute, micro in itertools.product(
            arguments.zero_stage or (0, 1, 2, 3),
            arguments.offload_optimizer,
            arguments.offload_param,
            arguments.recompute_granularity or ("none", "selective", "full"),
            arguments.micro_batch_size or (1, 2, 4, 8),
        ):
            yield Layout(
                tensor=t,
                pipeline=p,
                context=c,
                data=gpus // max(1, t * p * c),
                zero_stage=zero,
                offload_optimizer=optimizer == "cpu",
                offload_param=param == "cpu",
                sequence_parallel=arguments.sequence_parallel and t > 1,
                recompute=recompute,
                micro_batch_size=micro,
            )


def _refusals(layout: Layout, workload: Workload, cluster: Cluster) -> dict[str, str]:
    """Constraints of the machine, then those of the layout itself."""
    if layout.ranks != cluster.gpus:
        return {
            "ranks": f"tensor {layout.tensor} x pipeline {layout.pipeline} x context {layout.context} ranks do not "
            f"divide --gpus {cluster.gpus}"
        }
    reasons = check_layout(workload, layout)
    if layout.tensor > cluster.gpus_per_node:
        reasons["node"] = (
            f"--tensor-model-parallel-size {layout.tensor} would cross nodes of {cluster.gpus_per_node} GPUs in every "
            "block; use pipeline stages across nodes"
        )
    return reasons


def _too_large(plan: Estimate, cluster: Cluster) -> str:
    return (
        f"stage {plan.fullest_stage} needs {plan.memory.peak / GIB:.1f} GiB per rank, and there are "
        f"{cluster.memory / GIB:.1f}; use more tensor, pipeline or context ranks, a higher ZeRO stage, a smaller "
        "micro-batch or more recomputation"
    )
