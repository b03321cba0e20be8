"""Which parallel layout fits a model on a cluster, and what each would cost.

    python tools/plan_parallelism.py --model haplovl-8b --gpus 64 [--json PATH] [flags]

For every layout (tensor x pipeline x context x data-parallel ranks, ZeRO stage, recomputation, micro-batch size):
memory per rank by kind, pipeline bubble, bytes sent per step, expected step time and MFU. One is recommended; what is
impossible is refused with the constraint that fails. The model and the recipe are set by the flags of the training
scripts, or by their files (--config), whose own layout is not looked at. Defaults describe nodes of eight H100;
`docs/parallelism_plans.md` says where the figures come from and what is assumed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_haplovl.config.cli import add_settings, add_sources, combine
from megatron_haplovl.config.files import read_settings
from megatron_haplovl.config.layout import Layout, Workload, check_layout
from megatron_haplovl.config.presets import STAGE_DEFAULTS
from megatron_haplovl.config.schema import Config, ModelConfig, RecipeConfig
from megatron_haplovl.config.stages import RECIPES
from megatron_haplovl.config.validate import validate_model
from megatron_haplovl.data.image_geometry import image_layout
from megatron_haplovl.planning.estimate import Estimate, estimate
from megatron_haplovl.planning.machine import GIB, Cluster, DataSheet
from megatron_haplovl.planning.work import Work, work_of_sequence
from megatron_haplovl.training.recipe import trained_parts

# Estimates are no finer than this: of the layouts as fast as the fastest, the one with most room is recommended.
_AS_FAST = 1.02


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan.

    Returns:
        1 if no layout is possible, else 0.
    """
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        base, config = _config(arguments)
        work = _sequence(arguments, config)
    except ValueError as error:
        parser.error(str(error))
    workload = Workload.of(config)
    cluster = _cluster(arguments)

    plans: list[Estimate] = []
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
                    trained=trained_parts(config.recipe),
                    bf16=config.precision.bf16,
                    partition=arguments.pipeline_partition,
                )
            except ValueError as error:  # An explicit partition is for one number of stages.
                refused.append((layout, {"partition": str(error)}))
                continue
            if plan.memory.peak <= cluster.memory:
                plans.append(plan)
                continue
            reasons = {"memory": _too_large(plan, cluster)}
        refused.append((layout, reasons))
    plans.sort(key=lambda plan: plan.step_seconds)
    best = _recommended(plans)

    _print_question(base, config, workload, work, cluster)
    _print_refused(refused)
    if best is None:
        print("\nno layout is possible")
    else:
        shown = plans[: arguments.top]
        _print_plans(shown if best in shown else [*shown, best], len(plans))
        _print_recommended(best)
    if arguments.json:
        _write_json(Path(arguments.json), arguments, workload, work, plans, refused, best)
    return 0 if plans else 1


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_sources(parser)
    parser.add_argument(
        "--seq-length", type=int, metavar="N", help="tokens of a packed sequence (default: the preset's)"
    )
    parser.add_argument("--global-batch-size", type=int, metavar="N", help="sequences per step (default: the recipe's)")
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, help="bf16, or fp32 (default: the file's, else bf16)"
    )
    parser.add_argument(
        "--top", type=int, default=20, metavar="N", help="layouts to print, fastest first (default: 20)"
    )
    parser.add_argument("--json", metavar="PATH", help="write every layout, possible or refused, to this file")

    machine = parser.add_argument_group("machine", "Bandwidths are per GPU and direction, as the data sheet has them.")
    machine.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs of the run")
    sold = DataSheet()
    for name, text in (
        ("gpus_per_node", "GPUs of a node"),
        ("memory_gib", "memory of a GPU"),
        ("reserved_gib", "of it, for CUDA's context, NCCL, libraries and fragmentation"),
        ("peak_tflops", "dense bf16 arithmetic of a GPU"),
        ("memory_gb_per_second", "memory bandwidth of a GPU"),
        ("intra_node_gb_per_second", "between GPUs of a node"),
        ("inter_node_gb_per_second", "between nodes"),
        ("intra_hop_microseconds", "time of a ring's step inside a node beyond its bytes"),
        ("inter_hop_microseconds", "the same between nodes"),
        ("efficiency", "share of the peak that matrix products reach"),
        ("attention_efficiency", "share of the peak that attention reaches on visible pairs"),
        ("overlap", "share of ZeRO 3's messages that can pass beside arithmetic"),
        ("host_link_gb_per_second", "between a GPU and its host, for offload"),
        ("host_memory_gb_per_second", "memory bandwidth of the host, per GPU, for offload"),
        ("bandwidth_efficiency", "share of the bandwidths, of memory and network, that is reached"),
    ):
        default = getattr(sold, name)
        machine.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(default),
            default=default,
            metavar="X",
            help=f"{text} (default: {default:g})",
        )

    layout = parser.add_argument_group("layouts", "Values to try; default: all that divide.")
    for flag, text in (
        ("--tensor-model-parallel-size", "ranks that share every matrix"),
        ("--pipeline-model-parallel-size", "stages"),
        ("--context-parallel-size", "ranks that share every sequence"),
        ("--zero-stage", "ZeRO stages"),
        ("--micro-batch-size", "sequences per forward pass"),
    ):
        layout.add_argument(flag, type=int, nargs="+", metavar="N", help=text)
    layout.add_argument(
        "--recompute-granularity", nargs="+", choices=("none", "selective", "full"), help="what backward recomputes"
    )
    layout.add_argument(
        "--offload-optimizer", nargs="+", choices=("none", "cpu"), default=["none"], help="(default: none)"
    )
    layout.add_argument("--offload-param", nargs="+", choices=("none", "cpu"), default=["none"], help="(default: none)")
    layout.add_argument(
        "--pipeline-partition",
        default="auto",
        metavar="auto|parameters|uniform|LAYER,...",
        help="where stages begin, as for the training (default: auto)",
    )
    layout.add_argument(
        "--sequence-parallel",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with tensor parallelism (default: on)",
    )

    data = parser.add_argument_group("data", "A sequence is packed with equal documents of this kind.")
    data.add_argument("--images-per-document", type=int, default=1, metavar="N", help="(default: 1)")
    data.add_argument(
        "--image-pixels",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="size of each image (default: one tile; with any resolution two by two)",
    )
    data.add_argument("--text-tokens", type=int, default=256, metavar="N", help="text tokens (default: 256)")
    data.add_argument(
        "--trained-tokens", type=int, default=128, metavar="N", help="of them, answer tokens (default: 128)"
    )
    add_settings(parser, RecipeConfig, ("recipe",), "")
    add_settings(parser, ModelConfig, ("model",), "")
    return parser


def _config(arguments: argparse.Namespace) -> tuple[str, Config]:
    """The run that the training scripts would build from these files and flags, and the name of its model."""
    overrides: dict[tuple[str, ...], Any] = {
        tuple(name.split(".")): value for name, value in vars(arguments).items() if "." in name
    }
    if arguments.seq_length is not None:
        overrides["data", "seq_length"] = arguments.seq_length
    if arguments.global_batch_size is not None:
        overrides["schedule", "global_batch_size"] = arguments.global_batch_size
    files = [read_settings(path) for path in arguments.config]
    given = {path: value for file in files for path, value in file.values.items()} | overrides
    if arguments.bf16 is None:
        arguments.bf16 = given.get(("precision", "bf16"), True)
    overrides["precision", "bf16"] = arguments.bf16
    recipe = given.get(("recipe", "recipe"), STAGE_DEFAULTS["finetune"]["recipe"]["recipe"])
    combined = combine(RECIPES[recipe].stage.name, arguments.model, files, overrides)
    config = combined.config
    validate_model(config.model)
    for flag, value in (
        ("--gpus", arguments.gpus),
        ("--gpus-per-node", arguments.gpus_per_node),
        ("--global-batch-size", config.schedule.global_batch_size),
        ("--seq-length", config.data.seq_length),
    ):
        if value < 1:
            raise ValueError(f"{flag} must be at least 1, got {value}")
    for name in (
        "peak_tflops",
        "efficiency",
        "attention_efficiency",
        "bandwidth_efficiency",
        "memory_gb_per_second",
        "intra_node_gb_per_second",
        "inter_node_gb_per_second",
        "host_link_gb_per_second",
        "host_memory_gb_per_second",
    ):
        if getattr(arguments, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, got {getattr(arguments, name)}")
    return combined.base, config


def _sequence(arguments: argparse.Namespace, config: Config) -> Work:
    """One packed sequence."""
    vision = config.model.vision
    side = vision.image_size * (2 if vision.image_aspect_ratio == "anyres" and vision.max_tiles >= 4 else 1)
    height, width = arguments.image_pixels or (side, side)
    image = image_layout(height, width, vision)
    return work_of_sequence(
        config.data.seq_length,
        images=[image.num_tokens] * arguments.images_per_document,
        text=arguments.text_tokens,
        trained=arguments.text_tokens if config.stage.has_teachers else arguments.trained_tokens,
        newlines=image.num_tokens - image.num_patches,
        cells_per_tile=vision.cells_per_tile,
        image_attention=config.model.image_attention,
    )


def _cluster(arguments: argparse.Namespace) -> Cluster:
    names = (field.name for field in dataclasses.fields(DataSheet))
    return DataSheet(**{name: getattr(arguments, name) for name in names}).cluster(arguments.gpus)


def _layouts(arguments: argparse.Namespace, workload: Workload) -> Iterator[Layout]:
    """Every arrangement to look at. A value that the user names is tried even where it is hopeless, to say why."""
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


def _recommended(plans: Sequence[Estimate]) -> Estimate | None:
    """The roomiest of the fastest."""
    if not plans:
        return None
    fastest = [plan for plan in plans if plan.step_seconds <= _AS_FAST * plans[0].step_seconds]
    return min(fastest, key=lambda plan: plan.memory.peak)


def _print_question(base: str, config: Config, workload: Workload, work: Work, cluster: Cluster) -> None:
    print(
        f"{base}, recipe {config.recipe.recipe}, {'bf16' if config.precision.bf16 else 'fp32'}; sequences of "
        f"{workload.seq_length:,} tokens, {workload.global_batch_size} per step; a sequence has {work.patches:,.0f} "
        f"patches, {work.head_tokens:,.0f} tokens with logits and {work.pairs / 1e6:.1f} M visible pairs"
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


def _write_json(
    path: Path,
    arguments: argparse.Namespace,
    workload: Workload,
    work: Work,
    plans: Sequence[Estimate],
    refused: Sequence[tuple[Layout, dict[str, str]]],
    best: Estimate | None,
) -> None:
    content = {
        "arguments": vars(arguments),
        "workload": {**dataclasses.asdict(workload), "stage": workload.stage.name},
        "sequence": dataclasses.asdict(work),
        "recommended": None if best is None else _record(best),
        "possible": [_record(plan) for plan in plans],
        "refused": [{"layout": dataclasses.asdict(layout), "constraints": reasons} for layout, reasons in refused],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _record(plan: Estimate) -> dict[str, Any]:
    record = dataclasses.asdict(plan)
    record["memory"] = {**dataclasses.asdict(plan.memory), "peak": plan.memory.peak}
    record["fullest_stage"] = plan.fullest_stage
    return record


if __name__ == "__main__":
    sys.exit(main())
