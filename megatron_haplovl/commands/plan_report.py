"""What `haplovl-plan` prints and writes."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_haplovl.commands.plan_search import Found
from megatron_haplovl.config.layout import Layout, Workload
from megatron_haplovl.config.schema import Config
from megatron_haplovl.planning.estimate import Estimate
from megatron_haplovl.planning.machine import GIB, Cluster
from megatron_haplovl.planning.work import Work


def print_report(
    base: str, top: int, config: Config, workload: Workload, batch: str, work: Work, cluster: Cluster, found: Found
) -> None:
    """The question, what is refused and why, the fastest layouts, and the recommended one with its flags."""
    _print_question(base, config, workload, batch, work, cluster)
    _print_refused(found.refused)
    best = found.recommended
    if best is None:
        print("\nno layout is possible")
        return
    shown = found.possible[:top]
    _print_plans(shown if best in shown else [*shown, best], len(found.possible))
    _print_recommended(best)


def _print_question(base: str, config: Config, workload: Workload, batch: str, work: Work, cluster: Cluster) -> None:
    counted = f" ({batch})" if batch else ""
    print(
        f"{base}, recipe {config.recipe.recipe}, {'bf16' if config.precision.bf16 else 'fp32'}; sequences of "
        f"{workload.seq_length:,} tokens, {workload.global_batch_size} per step{counted}; a sequence has "
        f"{work.patches:,.0f} patches, {work.head_tokens:,.0f} tokens with logits and "
        f"{work.pairs / 1e6:.1f} M visible pairs"
    )
    print(
        f"{cluster.gpus} GPUs, {cluster.gpus_per_node} per node, {cluster.memory / GIB:.1f} GiB usable each; assumed "
        f"to reach {cluster.speeds.products / 1e12:.0f} TFLOP/s in matrix products and "
        f"{cluster.speeds.attention / 1e12:.0f} in attention of a peak of {cluster.peak / 1e12:.0f}, and "
        f"{cluster.intra_node / 1e9:.0f} GB/s inside and {cluster.inter_node / 1e9:.1f} between nodes"
    )


def _print_refused(refused: Sequence[tuple[Layout, dict[str, str]]]) -> None:
    examples: dict[str, list[str]] = {}
    for _, reasons in refused:
        for name, sentence in reasons.items():
            examples.setdefault(name, []).append(sentence)
    if examples:
        print(f"\nrefused: {len(refused)} layouts, by constraint (a layout may fail several), with an example")
    for name, sentences in examples.items():
        print(f"  {name} ({len(sentences)}): {sentences[0]}")


def _row(plan: Estimate) -> dict[str, str]:
    layout, memory = plan.layout, plan.memory
    gib = {
        "param": memory.engine.parameters + memory.teacher,
        "grad": memory.engine.gradients,
        "optim": memory.engine.optimizer,
        "buffer": memory.engine.buffers + memory.messages,
        "activ": memory.activations,
        "peak": memory.peak,
    }
    sent = {"TP": plan.tensor_bytes, "CP": plan.context_bytes, "PP": plan.pipeline_bytes, "DP": plan.data_bytes}
    return {
        "tp": str(layout.tensor),
        "pp": str(layout.pipeline),
        "cp": str(layout.context),
        "dp": str(layout.data),
        "zero": f"{layout.zero_stage}{' +o' * layout.offload_optimizer}{' +p' * layout.offload_param}",
        "recompute": layout.recompute,
        "micro": str(layout.micro_batch_size),
        **{name: f"{size / GIB:.1f}" for name, size in gib.items()},
        "bubble %": f"{100 * plan.bubble:.1f}",
        **{name: f"{size / 1e9:.1f}" for name, size in sent.items()},
        "step s": f"{plan.step_seconds:.3f}",
        "MFU %": f"{100 * plan.mfu:.1f}",
    }


def _print_plans(plans: Sequence[Estimate], total: int) -> None:
    print(f"\npossible: {total} layouts, of which the fastest; GiB on a rank of the fullest stage, GB sent by a rank")
    if any(plan.memory.engine.host for plan in plans):
        print("on the host: +o the optimizer, +p the parameters")
    rows = [_row(plan) for plan in plans]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    print("  ".join(name.rjust(width) for name, width in widths.items()))
    for row in rows:
        print("  ".join(row[name].rjust(width) for name, width in widths.items()))


def _print_recommended(plan: Estimate) -> None:
    layout = plan.layout
    flags = [
        *("--tensor-model-parallel-size", layout.tensor),
        *(("--sequence-parallel",) if layout.sequence_parallel else ()),
        *("--pipeline-model-parallel-size", layout.pipeline),
        *("--context-parallel-size", layout.context),
        *("--zero-stage", layout.zero_stage),
        *(("--offload-optimizer", "cpu") if layout.offload_optimizer else ()),
        *(("--offload-param", "cpu") if layout.offload_param else ()),
        *(("--recompute-granularity", layout.recompute) if layout.recompute != "none" else ()),
        *("--micro-batch-size", layout.micro_batch_size),
    ]
    print(
        f"\nrecommended: {plan.step_seconds:.2f} s per step, MFU {100 * plan.mfu:.1f} %, "
        f"{plan.memory.peak / GIB:.1f} GiB per rank, micro-batches per step: {plan.micro_batches}"
    )
    print("  " + " ".join(str(flag) for flag in flags))
    if plan.memory.engine.host:
        print(f"  on the host, {plan.memory.engine.host / GIB:.1f} GiB per rank")
    if layout.pipeline > 1:
        print(
            f"  stages begin at {', '.join(plan.first_layers)}; the slowest takes {100 * plan.imbalance:.1f} % longer "
            "than the mean"
        )


def write_json(path: Path, arguments: argparse.Namespace, workload: Workload, work: Work, found: Found) -> None:
    """Write the question and every layout, possible or refused."""
    best = found.recommended
    content = {
        "arguments": vars(arguments),
        "workload": {**dataclasses.asdict(workload), "stage": workload.stage.name},
        "sequence": dataclasses.asdict(work),
        "recommended": None if best is None else _record(best),
        "possible": [_record(plan) for plan in found.possible],
        "refused": [
            {"layout": dataclasses.asdict(layout), "constraints": reasons} for layout, reasons in found.refused
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _record(plan: Estimate) -> dict[str, Any]:
    record = dataclasses.asdict(plan)
    record["memory"] = {**dataclasses.asdict(plan.memory), "peak": plan.memory.peak}
    record["fullest_stage"] = plan.fullest_stage
    return record
