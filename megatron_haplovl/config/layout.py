"""The layout of a run, that is how its ranks are arranged, and which layouts are possible. Pure arithmetic on settings.

Used by the checks at start and by `haplovl-plan`, so that both refuse the same things in the same words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_haplovl.config.batch_schedule import BatchSchedule
from megatron_haplovl.config.schema import Config, ModelConfig
from megatron_haplovl.config.stages import FINETUNE, StageSpec


@dataclass(frozen=True)
class Layout:
    """One way to arrange `tensor * context * data * pipeline` ranks."""

    tensor: int = 1
    """Ranks that share every matrix (--tensor-model-parallel-size)."""
    pipeline: int = 1
    """Stages (--pipeline-model-parallel-size)."""
    context: int = 1
    """Ranks that share every sequence (--context-parallel-size)."""
    data: int = 1
    """Groups of ranks that hold different sequences. Weights and optimizer are split over `data * context` by ZeRO."""
    zero_stage: int = 1
    offload_optimizer: bool = False
    """Master weights, optimizer state and the optimizer step on the host (--offload-optimizer cpu)."""
    offload_param: bool = False
    """Parameters on the host until they are used (--offload-param cpu)."""
    sequence_parallel: bool = False
    """Norms and residual stream split over the tensor ranks, too (--sequence-parallel)."""
    recompute: str = "none"
    """none, selective or full; see `planning.cost.RECOMPUTED`."""
    micro_batch_size: int = 1

    @classmethod
    def of(cls, config: Config, data: int = 1) -> Layout:
        """The layout that a run's settings ask for.

        Args:
            config: the settings.
            data: the data-parallel size, which is known only when the processes have met.
        """
        parallel = config.parallel
        return cls(
            tensor=parallel.tensor_model_parallel_size,
            pipeline=parallel.pipeline_model_parallel_size,
            context=parallel.context_parallel_size,
            data=data,
            zero_stage=parallel.zero_stage,
            offload_optimizer=parallel.offload_optimizer == "cpu",
            offload_param=parallel.offload_param == "cpu",
            sequence_parallel=parallel.sequence_parallel,
            recompute=parallel.recompute_granularity,
            micro_batch_size=config.schedule.micro_batch_size,
        )

    @property
    def ranks(self) -> int:
        """Ranks of the whole run."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def replicas(self) -> int:
        """Ranks with the same weights. ZeRO splits optimizer, gradients and parameters over them."""
        return self.context * self.data


@dataclass(frozen=True)
class Workload:
    """What is to be trained, as far as it limits the layout."""

    model: ModelConfig
    seq_length: int
    """Tokens of a packed sequence."""
    global_batch_size: int
    """Sequences per optimizer step."""
    stage: StageSpec = FINETUNE
    batch_unit: str = "packs"
    """With `samples`, a step is filled up with empty sequences until all ranks have as many."""

    @classmethod
    def of(cls, config: Config) -> Workload:
        """What a run's settings ask for. With --batch-unit samples, a sequence for each sample, which is the most."""
        schedule = config.schedule
        return cls(config.model, config.data.seq_length, schedule.global_batch_size, config.stage, schedule.batch_unit)

    def micro_batches(self, layout: Layout) -> int:
        """Micro-batches that a rank goes through in a step."""
        return -(-self.global_batch_size // (layout.micro_batch_size * layout.data))

    @property
    def has_post_decoder(self) -> bool:
        """Whether the model has the language model's blocks, trained or not."""
        return "post_decoder" in self.stage.layers

    @property
    def num_layers(self) -> int:
        """Entries of the flat layer list."""
        blocks = {"pre_decoder": self.model.pre.num_layers, "post_decoder": self.model.post.num_layers}
        return sum(blocks.get(layer, 1) for layer in self.stage.layers)


def check_layout(workload: Workload, layout: Layout) -> dict[str, str]:
    """What forbids this layout: constraint -> a sentence that says what to change; empty if nothing does."""
    for name in ("tensor", "pipeline", "context", "data", "micro_batch_size"):
        if getattr(layout, name) < 1:
            return {"sizes": f"the {name} size must be at least 1, got {getattr(layout, name)}"}
    broken = {name: check(workload, layout) for name, check in CONSTRAINTS.items()}
    return {name: sentence for name, sentence in broken.items() if sentence is not None}


def _heads(workload: Workload, layout: Layout) -> str | None:
    """Whole heads per rank: the tensor ranks share them always, the context ranks inside attention (Ulysses)."""
    ranks = layout.tensor * layout.context
    for flag, heads in _head_counts(workload).items():
        if "key-value" not in flag and heads % ranks:
            return (
                f"--{flag} {heads} is not a multiple of --tensor-model-parallel-size {layout.tensor} x "
                f"--context-parallel-size {layout.context} = {ranks}; attention shares whole heads, so make one smaller"
            )
    return None


def _kv_heads(workload: Workload, layout: Layout) -> str | None:
    ranks = layout.tensor * layout.context
    for flag, heads in _head_counts(workload).items():
        if "key-value" in flag and heads % ranks:
            return (
                f"--{flag} {heads} is not a multiple of --tensor-model-parallel-size {layout.tensor} x "
                f"--context-parallel-size {layout.context} = {ranks}; key/value heads are not replicated, so make one "
                "smaller"
            )
    return None


def _head_counts(workload: Workload) -> dict[str, int]:
    pre, post = workload.model.pre, workload.model.post
    counts = {"pre-num-attention-heads": pre.num_attention_heads}
    if workload.has_post_decoder:
        counts["post-num-attention-heads"] = post.num_attention_heads
        counts["post-num-key-value-heads"] = post.num_key_value_heads
    return counts


def _widths(workload: Workload, layout: Layout) -> str | None:
    model = workload.model
    widths = {
        "vocab-size": model.vocab_size,
        "pre-hidden-size": model.pre.hidden_size,
        "pre-ffn-hidden-size": model.pre.ffn_hidden_size,
        "post-hidden-size": model.post.hidden_size,
    }
    if workload.has_post_decoder:
        widths["post-ffn-hidden-size"] = model.post.ffn_hidden_size
    for flag, width in widths.items():
        if width % layout.tensor:
            return f"--{flag} {width} is not a multiple of --tensor-model-parallel-size {layout.tensor}"
    return None


def _sequence(workload: Workload, layout: Layout) -> str | None:
    pieces = layout.context * (layout.tensor if layout.sequence_parallel else 1)
    if workload.seq_length % pieces:
        flags = "--context-parallel-size" + (
            " x --tensor-model-parallel-size (--sequence-parallel)" if layout.sequence_parallel else ""
        )
        return f"--seq-length {workload.seq_length} is not a multiple of {flags} = {pieces}; choose a multiple of it"
    return None


def _sequence_parallel(_: Workload, layout: Layout) -> str | None:
    if layout.sequence_parallel and layout.tensor == 1:
        return "--sequence-parallel splits over the tensor ranks; it needs --tensor-model-parallel-size above 1"
    return None


def _stages(workload: Workload, layout: Layout) -> str | None:
    if layout.pipeline > workload.num_layers:
        return (
            f"--pipeline-model-parallel-size {layout.pipeline} is more than the {workload.num_layers} layers "
            "there are; every stage needs one"
        )
    return None


def _pipeline_zero(_: Workload, layout: Layout) -> str | None:
    if layout.pipeline > 1 and layout.zero_stage > 1:
        return (
            f"--zero-stage {layout.zero_stage} splits gradients in every micro-batch and does not run with "
            f"--pipeline-model-parallel-size {layout.pipeline}; use --zero-stage 1 or no pipeline"
        )
    return None


def _offload_optimizer(_: Workload, layout: Layout) -> str | None:
    # DeepSpeed would move nothing, without a word.
    if layout.offload_optimizer and layout.zero_stage == 0:
        return "--offload-optimizer cpu moves what ZeRO splits; it needs --zero-stage 1, 2 or 3"
    return None


def _offload_param(_: Workload, layout: Layout) -> str | None:
    if layout.offload_param and layout.zero_stage != 3:
        return (
            "--offload-param cpu moves parameters that ZeRO has split; it needs --zero-stage 3, not "
            f"{layout.zero_stage}"
        )
    return None


def _batch(workload: Workload, layout: Layout) -> str | None:
    if workload.batch_unit == "samples":
        return None
    return check_batch(workload.global_batch_size, layout.micro_batch_size, layout.data)


def check_batch(global_batch_size: int, micro_batch_size: int, data_parallel_size: int) -> str | None:
    """Why the global batch cannot be divided into whole passes of all ranks; None if it can."""
    per_pass = micro_batch_size * data_parallel_size
    if global_batch_size % per_pass:
        return (
            f"--global-batch-size {global_batch_size} is not a multiple of --micro-batch-size {micro_batch_size} x "
            f"{data_parallel_size} data-parallel ranks; use a multiple of {per_pass}"
        )
    return None


def check_levels(batches: BatchSchedule, micro_batch_size: int, data_parallel_size: int = 1) -> str | None:
    """The same for the smaller batches of a ramp."""
    per_pass = micro_batch_size * data_parallel_size
    for size in batches.sizes:
        if size % per_pass:
            ranks = "" if data_parallel_size == 1 else f" x {data_parallel_size} data-parallel ranks"
            return (
                f"--rampup-batch-size {' '.join(map(str, batches.ramp))} has steps of {size}, which is not a multiple "
                f"of --micro-batch-size {micro_batch_size}{ranks}; make START and INCREMENT multiples of {per_pass}"
            )
    return None


CONSTRAINTS: dict[str, Callable[[Workload, Layout], str | None]] = {
    "heads": _heads,
    "key/value heads": _kv_heads,
    "widths": _widths,
    "sequence": _sequence,
    "sequence parallel": _sequence_parallel,
    "stages": _stages,
    "pipeline and ZeRO": _pipeline_zero,
    "offloaded optimizer": _offload_optimizer,
    "offloaded parameters": _offload_param,
    "batch": _batch,
}
"""Every constraint that can be checked without a machine, by name."""
