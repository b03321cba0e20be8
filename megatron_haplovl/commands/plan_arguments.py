"""The flags of `haplovl-plan`, and what they describe: a run, a packed sequence, a cluster."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from megatron_haplovl.config.cli import add_settings, add_sources, combine
from megatron_haplovl.config.files import read_settings
from megatron_haplovl.config.layout import Workload
from megatron_haplovl.config.schema import Config, ModelConfig, RecipeConfig
from megatron_haplovl.config.settings import with_settings
from megatron_haplovl.config.stages import FINETUNE, RECIPES
from megatron_haplovl.config.validate import validate_freezing, validate_model
from megatron_haplovl.data.image_geometry import Frames, Picture, VisualLayout, visual_layouts
from megatron_haplovl.data.loader import build_loader
from megatron_haplovl.planning.machine import Cluster, DataSheet
from megatron_haplovl.planning.work import Work, work_of_sequence

_DESCRIPTION = """Which parallel layout fits a model on a cluster, and what each would cost.

    %(prog)s --model haplovl-8b --gpus 64 [--json PATH] [flags]

For every layout (tensor x pipeline x context x data-parallel ranks, ZeRO stage, recomputation, micro-batch size):
memory per rank by kind, pipeline bubble, bytes sent per step, expected step time and MFU. One is recommended; what is
impossible is refused with the constraint that fails. The model and the recipe are set by the flags of the training
scripts, or by their files (--config), whose own layout is not looked at. Defaults describe nodes of eight H100;
`docs/reports/parallelism_plans.md` says where the figures come from and what is assumed.
"""


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_sources(parser)
    parser.add_argument(
        "--seq-length", type=int, metavar="N", help="tokens of a packed sequence (default: the preset's)"
    )
    parser.add_argument(
        "--global-batch-size", type=int, metavar="N", help="sequences or samples per step (default: the recipe's)"
    )
    parser.add_argument(
        "--batch-unit", choices=("packs", "samples"), help="what that counts (default: the file's, else packs)"
    )
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, help="bf16, or fp32 (default: the file's, else bf16)"
    )
    parser.add_argument(
        "--top", type=int, default=20, metavar="N", help="layouts to print, fastest first (default: 20)"
    )
    parser.add_argument("--json", metavar="PATH", help="write every layout, possible or refused, to this file")

    _add_machine(parser)
    _add_layouts(parser)
    _add_data(parser)
    add_settings(parser, RecipeConfig, ("recipe",), "")
    add_settings(parser, ModelConfig, ("model",), "")
    return parser


def _add_machine(parser: argparse.ArgumentParser) -> None:
    machine = parser.add_argument_group("machine", "Bandwidths are per GPU and direction, as the data sheet has them.")
    machine.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs of the run")
    sold = DataSheet()
    for name, text in (
        ("gpus_per_node", "GPUs of a node"),
        ("memory_gib", "memory of a GPU"),
        ("reserved_gib", "part of that memory for CUDA's context, NCCL, libraries and fragmentation"),
        ("peak_tflops", "dense bf16 arithmetic of a GPU"),
        ("memory_gb_per_second", "memory bandwidth of a GPU"),
        ("intra_node_gb_per_second", "bandwidth between GPUs of a node"),
        ("inter_node_gb_per_second", "bandwidth between nodes"),
        ("intra_hop_microseconds", "time of a ring's step inside a node, beside sending its bytes"),
        ("inter_hop_microseconds", "the same between nodes"),
        ("efficiency", "share of the peak that matrix products reach"),
        ("attention_efficiency", "share of the peak that attention reaches on visible pairs"),
        ("overlap", "share of ZeRO 3's messages that can pass beside arithmetic"),
        ("host_link_gb_per_second", "bandwidth between a GPU and its host, for offload"),
        ("host_memory_gb_per_second", "memory bandwidth of the host, per GPU, for offload"),
        ("bandwidth_efficiency", "share of the bandwidths (memory and network) that is reached"),
    ):
        default = getattr(sold, name)
        machine.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(default),
            default=default,
            metavar="X",
            help=f"{text} (default: {default:g})",
        )


def _add_layouts(parser: argparse.ArgumentParser) -> None:
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


def _add_data(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data", "A sequence is packed with equal documents of this kind.")
    data.add_argument(
        "--images-per-document",
        type=int,
        default=1,
        metavar="N",
        help="several have fewer tiles each than one, as in training (default: 1)",
    )
    data.add_argument(
        "--image-pixels",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="size of each image (default: one tile; with any resolution two by two tiles)",
    )
    data.add_argument(
        "--video-frames",
        type=int,
        default=0,
        metavar="N",
        help="frames of a video beside the images (default: no video)",
    )
    data.add_argument("--text-tokens", type=int, default=256, metavar="N", help="text tokens (default: 256)")
    data.add_argument(
        "--trained-tokens", type=int, default=128, metavar="N", help="answer tokens among them (default: 128)"
    )
    for flag, what in (("--data-path", "the training's data"), ("--aux-data-path", "stage 1's auxiliary data")):
        data.add_argument(
            flag,
            nargs="+",
            default=(),
            metavar="PREFIX",
            help=f"{what}: with --batch-unit samples, their pack plan says how many sequences a step has (default: as "
            "many as documents of this kind need)",
        )


def config_from(arguments: argparse.Namespace) -> tuple[str, Config]:
    """The preset or file that the run starts from, and the run that the training scripts would build from these flags.

    Raises:
        ValueError: flags that contradict each other, or that no machine or run can have.
    """
    overrides: dict[tuple[str, ...], Any] = {
        tuple(name.split(".")): value for name, value in vars(arguments).items() if "." in name
    }
    if arguments.seq_length is not None:
        overrides["data", "seq_length"] = arguments.seq_length
    if arguments.global_batch_size is not None:
        overrides["schedule", "global_batch_size"] = arguments.global_batch_size
    if arguments.batch_unit is not None:
        overrides["schedule", "batch_unit"] = arguments.batch_unit
    files = [read_settings(path) for path in arguments.config]
    given = {path: value for file in files for path, value in file.values.items()} | overrides
    if arguments.bf16 is None:
        arguments.bf16 = given.get(("precision", "bf16"), True)
    overrides["precision", "bf16"] = arguments.bf16
    recipe = given.get(("recipe", "recipe"), FINETUNE.defaults["recipe.recipe"])
    combined = combine(RECIPES[recipe].stage.name, arguments.model, files, overrides)
    config = combined.config
    validate_model(config.model)
    validate_freezing(config)
    for flag, value in (
        ("--gpus", arguments.gpus),
        ("--gpus-per-node", arguments.gpus_per_node),
        ("--global-batch-size", config.schedule.global_batch_size),
        ("--seq-length", config.data.seq_length),
    ):
        if value < 1:
            raise ValueError(f"{flag} must be at least 1, got {value}")
    for name in ("images_per_document", "video_frames"):
        if getattr(arguments, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 0, got {getattr(arguments, name)}")
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


def sequence_from(arguments: argparse.Namespace, config: Config) -> Work:
    """One packed sequence.

    Raises:
        ValueError: a document does not fit it.
    """
    return work_of_sequence(
        config.data.seq_length,
        visuals=_visuals(arguments, config),
        text=arguments.text_tokens,
        trained=arguments.text_tokens if config.stage.has_teachers else arguments.trained_tokens,
        image_attention=config.model.image_attention,
    )


def workload_from(arguments: argparse.Namespace, config: Config) -> tuple[Workload, str]:
    """What is to be trained; and, of a batch in samples, how many there are and how their sequences were counted.

    Raises:
        ValueError: data that cannot be read or planned.
    """
    workload, samples = Workload.of(config), config.schedule.global_batch_size
    if config.schedule.batch_unit == "packs":
        return workload, ""
    if arguments.data_path:
        # Of a ramp, what counts is its largest batch.
        one_each = with_settings(config, {("schedule", "micro_batch_size"): 1, ("schedule", "rampup_batch_size"): ()})
        aux = tuple(arguments.aux_data_path)
        # One epoch is like the next.
        data = build_loader(tuple(arguments.data_path), one_each, num_steps=1, dp_rank=0, dp_size=1, aux_paths=aux)
        return dataclasses.replace(workload, global_batch_size=data.sequences), f"{samples} samples, by their pack plan"
    length = arguments.text_tokens + sum(visual.num_tokens for visual in _visuals(arguments, config))
    sequences = -(-samples // (config.data.seq_length // length))
    return (
        dataclasses.replace(workload, global_batch_size=sequences),
        f"{samples} samples, if all are of the kind that is described; --data-path takes their pack plan",
    )


def _visuals(arguments: argparse.Namespace, config: Config) -> list[VisualLayout]:
    vision = config.model.vision
    side = vision.image_size * (2 if vision.image_aspect_ratio == "anyres" and vision.max_tiles >= 4 else 1)
    height, width = arguments.image_pixels or (side, side)
    visuals: list[Picture | Frames] = [Picture(height, width)] * arguments.images_per_document
    if arguments.video_frames:
        visuals.append(Frames(arguments.video_frames))
    return visual_layouts(visuals, vision)


def cluster_from(arguments: argparse.Namespace) -> Cluster:
    """The machine that the flags describe."""
    names = (field.name for field in dataclasses.fields(DataSheet))
    return DataSheet(**{name: getattr(arguments, name) for name in names}).cluster(arguments.gpus)
