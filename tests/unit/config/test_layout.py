"""What a layout is refused for."""

from __future__ import annotations

import dataclasses
import re

import pytest

from megatron_haplovl.config.cli import build_config
from megatron_haplovl.config.layout import CONSTRAINTS, Layout, Workload, check_layout
from megatron_haplovl.config.presets import MODELS
from megatron_haplovl.config.stages import PRETRAIN

WORKLOAD = Workload(MODELS["haplovl-8b"], seq_length=6144, global_batch_size=128)
QWEN = Workload(MODELS["haplovl-7b-pro"], seq_length=6144, global_batch_size=128)


def test_possible_layouts() -> None:
    for layout in (
        Layout(),
        Layout(tensor=8, sequence_parallel=True, data=16),
        Layout(tensor=2, context=4, data=2, zero_stage=3),
        Layout(tensor=4, pipeline=60, data=128, zero_stage=1),
        Layout(data=8, zero_stage=1, offload_optimizer=True),
        Layout(data=8, zero_stage=3, offload_optimizer=True, offload_param=True),
    ):
        assert check_layout(WORKLOAD, layout) == {}
    assert Layout(tensor=2, pipeline=3, context=5, data=7).ranks == 210
    assert Layout(tensor=2, pipeline=3, context=5, data=7).replicas == 35


@pytest.mark.parametrize(
    ("workload", "layout", "name", "message"),
    [
        (WORKLOAD, Layout(tensor=0), "sizes", "the tensor size must be at least 1, got 0"),
        (QWEN, Layout(tensor=8), "heads", "--post-num-attention-heads 28 is not a multiple of .* 8 x .* 1 = 8"),
        (WORKLOAD, Layout(tensor=4, context=8), "heads", "--pre-num-attention-heads 16 is not a multiple .* = 32"),
        (QWEN, Layout(tensor=7), "key/value heads", "--post-num-key-value-heads 4 .* not replicated"),
        (WORKLOAD, Layout(tensor=4, context=4), "key/value heads", "--post-num-key-value-heads 8 .* 4 x .* 4 = 16"),
        (
            dataclasses.replace(WORKLOAD, model=dataclasses.replace(WORKLOAD.model, vocab_size=1001)),
            Layout(tensor=2),
            "widths",
            "--vocab-size 1001 is not a multiple of --tensor-model-parallel-size 2",
        ),
        (dataclasses.replace(WORKLOAD, seq_length=6143), Layout(context=2), "sequence", "--seq-length 6143 .* = 2;"),
        (
            dataclasses.replace(WORKLOAD, seq_length=6146),
            Layout(tensor=4, sequence_parallel=True),
            "sequence",
            "--seq-length 6146 .*--sequence-parallel.* = 4;",
        ),
        (WORKLOAD, Layout(sequence_parallel=True), "sequence parallel", "needs --tensor-model-parallel-size above 1"),
        (WORKLOAD, Layout(pipeline=61), "stages", "61 is more than the 60 layers"),
        (dataclasses.replace(WORKLOAD, stage=PRETRAIN), Layout(pipeline=27), "stages", "27 is more than the 26 layers"),
        (WORKLOAD, Layout(pipeline=2, zero_stage=2), "pipeline and ZeRO", "use --zero-stage 1 or no pipeline"),
        (WORKLOAD, Layout(pipeline=2, zero_stage=3), "pipeline and ZeRO", "--zero-stage 3"),
        (WORKLOAD, Layout(zero_stage=0, offload_optimizer=True), "offloaded optimizer", "needs --zero-stage 1, 2 or 3"),
        (WORKLOAD, Layout(zero_stage=2, offload_param=True), "offloaded parameters", "needs --zero-stage 3, not 2"),
        (WORKLOAD, Layout(data=24), "batch", "--global-batch-size 128 is not a multiple of .* 24 data-parallel ranks"),
        (WORKLOAD, Layout(data=64, micro_batch_size=4), "batch", "use a multiple of 256"),
    ],
)
def test_refused_layouts(workload: Workload, layout: Layout, name: str, message: str) -> None:
    sentence = check_layout(workload, layout)[name]
    assert re.search(message, sentence), sentence


def test_stage_1_has_no_post_decoder_to_share() -> None:
    assert check_layout(dataclasses.replace(QWEN, stage=PRETRAIN), Layout(tensor=8)) == {}


def test_every_constraint_is_tested() -> None:
    tested = {case[2] for case in test_refused_layouts.pytestmark[0].args[1]}
    assert tested == {"sizes", *CONSTRAINTS}


def test_a_layout_takes_everything_from_the_settings() -> None:
    parallel = {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 1,
        "context_parallel_size": 3,
        "zero_stage": 3,
        "offload_optimizer": "cpu",
        "offload_param": "cpu",
        "sequence_parallel": True,
        "recompute_granularity": "full",
    }
    overrides: dict[tuple[str, ...], object] = {("parallel", name): value for name, value in parallel.items()}
    config = build_config("pretrain", "haplovl-debug", {**overrides, ("schedule", "micro_batch_size"): 4})
    expected = Layout(2, 1, 3, 5, 3, True, True, True, "full", 4)
    assert Layout.of(config, data=5) == expected
    # Every field differs from its default but the pipeline's, which does not go with ZeRO 3.
    same = [name for name, value in vars(expected).items() if value == getattr(Layout(), name)]
    assert same == ["pipeline"]
    assert Workload.of(config) == Workload(config.model, 512, 256, PRETRAIN)
