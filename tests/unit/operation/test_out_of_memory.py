"""Advice names only what is not done yet, and what the layout's own checks allow."""

import dataclasses

import pytest

from megatron_haplovl.config.cli import parse_args
from megatron_haplovl.config.validate import validate
from megatron_haplovl.operation.out_of_memory import advice

BASE = ["--model", "haplovl-7b", "--mock-data", "--seq-length", "1024", "--global-batch-size", "64"]
OFFLOADED = ["--offload-optimizer", "cpu", "--offload-param", "cpu"]
EVERYTHING = ["--bf16", "--recompute-granularity", "full", "--zero-stage", "3", *OFFLOADED]


def advised(flags, ranks):
    return advice(parse_args("finetune", argv=[*BASE, *flags]), ranks)


def test_all_steps_in_the_order_of_their_cost():
    steps = [
        "--micro-batch-size 1",
        "--recompute-granularity selective",
        "--recompute-granularity full",
        "--bf16",
        "--zero-stage 2",
        "--zero-stage 3",
        "--tensor-model-parallel-size 2 --sequence-parallel",
        "--context-parallel-size 2",
        "--offload-optimizer cpu",
        "a --seq-length below 1024",
    ]
    found = advised(["--micro-batch-size", "2"], 2)
    places = [found.index(f"({number}) {step}") for number, step in enumerate(steps, 1)]
    assert places == sorted(places)
    assert f"({len(steps) + 1})" not in found


@pytest.mark.parametrize(
    ("flags", "ranks", "absent"),
    [
        (["--micro-batch-size", "1"], 1, ["--micro-batch-size"]),
        (["--recompute-granularity", "selective"], 1, ["selective"]),
        (["--recompute-granularity", "full"], 1, ["--recompute"]),
        (["--bf16"], 1, ["--bf16"]),
        ([], 1, ["--zero-stage", "parallel-size"]),
        (["--pipeline-model-parallel-size", "2"], 4, ["--zero-stage"]),
        (["--zero-stage", "2"], 2, ["--zero-stage 2"]),
        (["--offload-optimizer", "cpu"], 2, ["--offload-optimizer"]),
        (["--zero-stage", "0"], 2, ["--offload-optimizer"]),
        (["--tensor-model-parallel-size", "16", "--sequence-parallel"], 32, ["--tensor-model-parallel-size 32"]),
    ],
)
def test_nothing_that_is_done_or_impossible(flags, ranks, absent):
    found = advised(flags, ranks)
    assert [word for word in absent if word in found] == []


def test_at_the_end_only_the_length_is_left():
    assert advised(EVERYTHING, 1) == "change, cheapest first: (1) a --seq-length below 1024 (other batches)"


def test_what_is_advised_is_accepted():
    config = parse_args("finetune", argv=[*BASE, "--zero-stage", "2"])
    assert "--offload-optimizer cpu" in advice(config, 2)
    validate(dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, offload_optimizer="cpu")))
