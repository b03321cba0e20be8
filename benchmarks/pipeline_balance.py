"""Time of every pipeline stage, predicted and measured, under our cut and under both of DeepSpeed's.

    python benchmarks/pipeline_balance.py [--json PATH] [--shrink N] [--stages 2 4 8] [--repeats N]

The model is haplovl-7b with all of its 58 blocks, and every width, the vocabulary and the number of heads divided by
`--shrink`; heads keep their widths. The batch is one packed sequence of 2,048 tokens: three samples of an image, an
untrained question and a trained answer. Stage 2 trains everything; stage 1 distils, with a teacher of the
pre-decoder's size in its last layer.

`auto` is `planning.stage_cut`, with the rates that training assumes for this device. `parameters` and `uniform` are
DeepSpeed's own functions on the same model. A stage is run alone in one process, forward and backward, on the hidden
states and gradients that the whole model has at its borders; all stages of all cuts take turns. Imbalance is the
slowest stage over the mean one, less one. A prediction is a stage's share of the whole; it is printed scaled to the
measured sum.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import machine, median_seconds, print_table, write_json
from benchmarks.planner_memory import STAGE1, STAGE2, build, make_batch
from megatron_haplovl.config.layout import Layout
from megatron_haplovl.config.presets import MODELS
from megatron_haplovl.config.schema import ModelConfig
from megatron_haplovl.config.stages import FINETUNE, PRETRAIN, StageSpec
from megatron_haplovl.data.batch import Batch
from megatron_haplovl.losses.distillation import distillation_loss
from megatron_haplovl.losses.language_modeling import next_token_loss
from megatron_haplovl.model.attention_inputs import AttentionInputs
from megatron_haplovl.model.haplovl import HaploVL, HaploVLForDistillation, LayeredModel, run_layers
from megatron_haplovl.planning.cost import layer_costs
from megatron_haplovl.planning.cost_units import precision_of
from megatron_haplovl.planning.machine import machine_of
from megatron_haplovl.planning.partition import stage_sums
from megatron_haplovl.planning.stage_cut import layer_loads, stage_cut
from megatron_haplovl.planning.work import work_of_batch
from megatron_haplovl.training.teacher import random_teacher

SEQ_LENGTH, TEXT_LENGTHS, QUESTION = 2048, (80, 100, 130), 40
MICRO_BATCHES = 8  # Decides between equally fast cuts only.

Layer = Callable[[torch.Tensor | None, AttentionInputs], torch.Tensor]


def shrunk(model: ModelConfig, factor: int) -> ModelConfig:
    """A model of the same depths and head widths, with all other sizes divided."""
    pre, post = model.pre, model.post
    return replace(
        model,
        vocab_size=model.vocab_size // factor,
        pre=replace(
            pre,
            hidden_size=pre.hidden_size // factor,
            ffn_hidden_size=pre.ffn_hidden_size // factor,
            num_attention_heads=pre.num_attention_heads // factor,
        ),
        post=replace(
            post,
            hidden_size=post.hidden_size // factor,
            ffn_hidden_size=post.ffn_hidden_size // factor,
            num_attention_heads=post.num_attention_heads // factor,
            num_key_value_heads=post.num_key_value_heads // factor,
        ),
    )


@dataclass(frozen=True, eq=False)
class FlatModel:
    """The flat layer list of a model, as a pipeline would cut it."""

    model: LayeredModel
    layers: dict[str, Layer]
    """The layers in order; the first ignores its input, the last returns the loss."""
    attention_inputs: Callable[[], AttentionInputs]
    """Makes the inputs anew for every micro-batch on every stage."""


def flat_model(config: ModelConfig, batch: Batch, stage: StageSpec, dtype: torch.dtype) -> FlatModel:
    """A model with random weights, as a list of functions of the hidden state."""
    model = build(config, dtype, stage, STAGE1 if stage.has_teachers else STAGE2).to(batch.tokens_BS.device)
    first, *inner, last = model.layers().items()
    layers: dict[str, Layer] = {first[0]: lambda _x, _inputs: model.embedding(batch)}
    for name, layer in inner:
        layers[name] = lambda x, inputs, layer=layer: run_layers([layer], x, inputs)  # type: ignore[misc]
    layers[last[0]] = _loss(model, config, batch, dtype)
    return FlatModel(
        model, layers, lambda: model.attention_inputs(batch.kv_start_BS, batch.kv_end_BS, batch.position_ids_BS)
    )


def _loss(model: HaploVL | HaploVLForDistillation, config: ModelConfig, batch: Batch, dtype: torch.dtype) -> Layer:
    if isinstance(model, HaploVL):
        return lambda x, _inputs: model.losses(x, batch, next_token_loss)["lm loss"]  # type: ignore[arg-type]
    teacher = random_teacher(config, -1, seed=0).to(batch.tokens_BS.device, dtype)

    def losses(x_BSD: torch.Tensor | None, _inputs: AttentionInputs) -> torch.Tensor:
        assert x_BSD is not None
        sums = model.losses(x_BSD, batch, teacher(batch), distillation_loss)
        return sums["vision loss"] + sums["feature loss"] + sums["ctp loss"]

    return losses


class Stages:
    """Runs any stage of a flat model on what the whole model has at its borders."""

    def __init__(self, model: FlatModel) -> None:
        self._model = model
        self._layers = list(model.layers.values())
        self._inputs: list[torch.Tensor | None] = [None]
        outputs: list[torch.Tensor] = []
        inputs = model.attention_inputs()
        for layer in self._layers:
            outputs.append(layer(self._inputs[-1], inputs))
            self._inputs.append(outputs[-1].detach().requires_grad_())
        self._grads: list[torch.Tensor | None] = [None] * len(self._inputs)
        for i in reversed(range(len(self._layers))):
            outputs[i].backward(self._grads[i + 1])
            below = self._inputs[i]
            self._grads[i] = None if below is None else below.grad

    def run(self, first: int, end: int) -> None:
        """Forward and backward of one micro-batch through the layers from `first` to `end`."""
        below = self._inputs[first]
        x = None if below is None else below.detach().requires_grad_()
        inputs = self._model.attention_inputs()
        for layer in self._layers[first:end]:
            x = layer(x, inputs)
        assert x is not None
        x.backward(self._grads[end])


def cuts(model: FlatModel, stages: int, auto: tuple[int, ...], with_deepspeed: bool) -> dict[str, tuple[int, ...]]:
    """Name of a partition -> first layer of every stage; DeepSpeed's are made as `PipelineModule` makes them."""
    found = {"auto": auto}
    if with_deepspeed:
        from deepspeed.runtime.utils import partition_balanced, partition_uniform

        counts = [
            sum(p.numel() for p in module.parameters() if p.requires_grad) for module in model.model.layers().values()
        ]
        found["parameters"] = tuple(int(i) for i in partition_balanced(counts, stages)[:-1])
        found["uniform"] = tuple(int(i) for i in partition_uniform(len(model.layers), stages)[:-1])
    return found


def deepspeed_is_here() -> bool:
    """Whether DeepSpeed's partitions can be made; says so if not."""
    try:
        import deepspeed.runtime.utils  # noqa: F401
    except ImportError as error:
        print(f"DeepSpeed's partitions are left out: {error}")
        return False
    return True


def measure(
    config: ModelConfig,
    stage: StageSpec,
    device: torch.device,
    dtype: torch.dtype,
    stage_counts: Sequence[int],
    repeats: int,
    with_deepspeed: bool,
    clock: Callable[[], float],
) -> list[dict[str, Any]]:
    """One record per stage count and partition."""
    batch = make_batch(config, TEXT_LENGTHS, SEQ_LENGTH, untrained=0 if stage.has_teachers else QUESTION).to(device)
    work, bf16 = work_of_batch(batch, stage), dtype == torch.bfloat16
    trained = STAGE1 if stage.has_teachers else STAGE2
    model = flat_model(config, batch, stage, dtype)
    precision = precision_of(bf16, zero_stage=1, device=device.type)
    costs = layer_costs(config, work, Layout(), precision, trained=trained, stage=stage)
    predicted = [load.seconds for load in layer_loads(costs, Layout(), machine_of(device.type, bf16), bf16)]
    all_cuts: dict[tuple[int, str], tuple[int, ...]] = {}
    for stages in stage_counts:
        names, auto = stage_cut(
            config,
            work,
            Layout(pipeline=stages),
            device=device.type,
            bf16=bf16,
            trained=trained,
            stage=stage,
            method="auto",
            micro_batches=MICRO_BATCHES,
        )
        assert names == list(model.layers)
        for name, cut in cuts(model, stages, auto, with_deepspeed).items():
            all_cuts[stages, name] = cut

    ran = Stages(model)
    seconds: dict[tuple[int, str], list[list[float]]] = {key: [[] for _ in cut] for key, cut in all_cuts.items()}
    for _ in range(repeats):
        for key, cut in all_cuts.items():
            for place, (first, end) in enumerate(pairwise((*cut, len(names)))):
                seconds[key][place].append(median_seconds(lambda a=first, b=end: ran.run(a, b), 0, 1, clock))  # type: ignore[misc]
    return [
        _record(stage, *key, [names[first] for first in cut], stage_sums(predicted, cut), seconds[key])
        for key, cut in all_cuts.items()
    ]


def _record(
    stage: StageSpec,
    stages: int,
    partition: str,
    first_layers: list[str],
    predicted: list[float],
    repeated: list[list[float]],
) -> dict[str, Any]:
    seconds = [statistics.median(of_stage) for of_stage in repeated]
    scale = sum(seconds) / sum(predicted)
    return {
        "training_stage": 1 if stage.has_teachers else 2,
        "stages": stages,
        "partition": partition,
        "imbalance": _imbalance(seconds),
        "predicted_imbalance": _imbalance(predicted),
        "worst_share_error": max(abs(scale * p / s - 1.0) for p, s in zip(predicted, seconds, strict=True)),
        "first_layers": first_layers,
        "stage_seconds": seconds,
        "predicted_stage_seconds": [scale * p for p in predicted],
    }


def _imbalance(seconds: Sequence[float]) -> float:
    return max(seconds) / statistics.mean(seconds) - 1.0


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the records to this file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="(default: bfloat16 on a GPU, else float32)")
    parser.add_argument("--shrink", type=int, default=8, metavar="N", help="1, 2, 4, 8 or 16 (default: 8)")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4, 8], metavar="N", help="(default: 2 4 8)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="times that each stage runs (default: 3)")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the process's CPU time, on a machine that is shared with other work; needs one thread",
    )
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    config = shrunk(MODELS["haplovl-7b"], arguments.shrink)
    if arguments.cpu_time and (device.type != "cpu" or torch.get_num_threads() > 1):
        parser.error("--cpu-time counts the seconds of all threads together; use a CPU and OMP_NUM_THREADS=1")
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    with_deepspeed = deepspeed_is_here()

    records: list[dict[str, Any]] = []
    for stage in (FINETUNE, PRETRAIN):
        counts = [stages for stages in arguments.stages if not stage.has_teachers or stages <= 4]
        records += measure(config, stage, device, dtype, counts, arguments.repeats, with_deepspeed, clock)
    where = machine(device)
    print(f"\n{where}; haplovl-7b, widths / {arguments.shrink}, {dtype}")
    print_table(
        records,
        ["training_stage", "stages", "partition", "imbalance", "predicted_imbalance", "worst_share_error"],
    )
    print("\nseconds of each stage, predicted / measured, with its first layer")
    for record in records:
        print(f"stage {record['training_stage']}, {record['stages']} stages, {record['partition']}")
        rows = zip(record["predicted_stage_seconds"], record["stage_seconds"], record["first_layers"], strict=True)
        print("  " + ", ".join(f"{p:.3f} / {s:.3f} {name}" for p, s, name in rows))
    if arguments.json:
        write_json(
            arguments.json, records, shrink=arguments.shrink, dtype=str(dtype), cpu_time=arguments.cpu_time, **where
        )


if __name__ == "__main__":
    main()
