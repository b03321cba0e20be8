"""haplovl-plan, from flags to the recommended layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_haplovl.commands import plan as command
from megatron_haplovl.config.cli import build_config
from megatron_haplovl.data.loader import build_loader

GIB = 2**30


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit status and what was printed."""
    status = command.main(list(words))
    return status, capsys.readouterr().out


SMALL = ("--model", "haplovl-8b", "--gpus", "8", "--micro-batch-size", "1", "--context-parallel-size", "1")


def test_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plans" / "plan.json"
    status, out = plan(capsys, *SMALL, "--json", str(path))
    assert status == 0
    content: dict[str, Any] = json.loads(path.read_text())
    times = [record["step_seconds"] for record in content["possible"]]
    assert times == sorted(times)
    for record in content["possible"]:
        layout = record["layout"]
        assert layout["tensor"] * layout["pipeline"] * layout["context"] * layout["data"] == 8
        assert layout["zero_stage"] <= 1 or layout["pipeline"] == 1
        assert record["memory"]["peak"] <= (79 - 6) * GIB
    best = content["recommended"]
    assert best in content["possible"]
    assert best["step_seconds"] <= 1.02 * times[0]
    assert f"recommended: {best['step_seconds']:.2f} s per step" in out
    assert f"--zero-stage {best['layout']['zero_stage']}" in out
    assert f"possible: {len(times)} layouts" in out
    # An 8B model with all its state needs more than one GPU has.
    refused = [record["constraints"] for record in content["refused"]]
    assert any("memory" in reasons for reasons in refused)
    assert any("pipeline and ZeRO" in reasons for reasons in refused)
    assert "memory (" in out and "GiB per rank, and there are 73.0" in out


def test_named_layouts_are_refused_with_every_reason(capsys: pytest.CaptureFixture[str]) -> None:
    status, out = plan(
        capsys,
        *("--model", "haplovl-7b-pro", "--gpus", "16", "--tensor-model-parallel-size", "16"),
        *("--pipeline-model-parallel-size", "1", "--context-parallel-size", "1", "--zero-stage", "1"),
    )
    assert status == 1 and "no layout is possible" in out
    assert "--post-num-attention-heads 28 is not a multiple of --tensor-model-parallel-size 16" in out
    assert "--post-num-key-value-heads 4 is not a multiple" in out
    assert "would cross nodes of 8 GPUs" in out


@pytest.mark.parametrize(
    ("words", "patches"),
    [
        # Two documents of 2,352 + 256 tokens fit. Several images have one tile each: two documents of 3 x 600 + 256.
        ((), 2 * 2304),
        (("--images-per-document", "3"), 2 * 3 * 576),
        (("--images-per-document", "2", "--image-token-budget", "4608"), 2 * 2304),
        # One document of 4,609 + 256 tokens, or with an image of one tile of 5,465.
        (("--images-per-document", "0", "--video-frames", "8"), 8 * 576),
        (("--images-per-document", "1", "--video-frames", "8"), 9 * 576),
    ],
)
def test_documents_have_the_tiles_of_training(
    words: tuple[str, ...], patches: int, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "1", "--zero-stage", "1")
    assert f"a sequence has {patches:,} patches," in plan(capsys, *SMALL, *layout, *words)[1]


def test_ranks_that_do_not_divide(capsys: pytest.CaptureFixture[str]) -> None:
    status, out = plan(
        capsys,
        *("--model", "haplovl-8b", "--gpus", "8", "--tensor-model-parallel-size", "3"),
        *("--pipeline-model-parallel-size", "1", "--context-parallel-size", "1"),
    )
    assert status == 1
    assert "tensor 3 x pipeline 1 x context 1 ranks do not divide --gpus 8" in out


def test_model_and_recipe_flags_reach_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = {}
    for name, words in {
        "full": (),
        "align": ("--recipe", "align"),
        "stage 1": ("--recipe", "distill"),
        "shallow": ("--post-num-layers", "8"),
        "short": ("--seq-length", "3072"),
        "frozen": ("--freeze-pre-decoder",),
    }.items():
        path = tmp_path / f"{name}.json"
        layout = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "1", "--zero-stage", "1")
        assert plan(capsys, *SMALL, *layout, "--json", str(path), *words)[0] == 0
        records[name] = json.loads(path.read_text())["possible"][0]
    optimizer = {name: record["memory"]["engine"]["optimizer"] for name, record in records.items()}
    seconds = {name: record["step_seconds"] for name, record in records.items()}
    assert optimizer["align"] == pytest.approx(12 * 1024 * 4096 / 2 / 4)
    assert optimizer["stage 1"] < optimizer["shallow"] < optimizer["frozen"] < optimizer["full"]
    assert seconds["short"] < seconds["full"] and seconds["shallow"] < seconds["full"]
    assert seconds["frozen"] < seconds["full"] and seconds["align"] < seconds["full"]


def test_offload_is_tried_where_it_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    words = ("--model", "haplovl-8b", "--gpus", "1", "--micro-batch-size", "1", "--zero-stage", "2", "3")
    assert plan(capsys, *words)[0] == 1
    status, out = plan(
        capsys, *words, "--offload-optimizer", "none", "cpu", "--offload-param", "none", "cpu", "--json", str(path)
    )
    assert status == 0
    assert "--offload-optimizer cpu" in out and "on the host, " in out and " 3 +o +p " in out
    content = json.loads(path.read_text())
    assert all(record["layout"]["offload_optimizer"] for record in content["possible"])
    refused = [record["constraints"] for record in content["refused"]]
    assert any("it needs --zero-stage 3, not 2" in reasons.get("offloaded parameters", "") for reasons in refused)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gpus", "0"), "--gpus must be at least 1, got 0"),
        (("--gpus", "8", "--text-tokens", "100000"), "does not fit a sequence of 6144"),
        (("--gpus", "8", "--video-frames", "11"), "a document of 7193 tokens does not fit a sequence of 6144"),
        (("--gpus", "8", "--images-per-document", "-1"), "--images-per-document must be at least 0, got -1"),
        (("--gpus", "8", "--video-frames", "-1"), "--video-frames must be at least 0, got -1"),
        (("--gpus", "8", "--trained-tokens", "1000"), "1000 trained tokens of 256 text tokens"),
        (("--gpus", "8", "--post-num-attention-heads", "30"), "--post-hidden-size 4096 is not a multiple"),
        (("--gpus", "8", "--efficiency", "0"), "--efficiency must be above 0"),
        (("--gpus", "8", "--recipe", "distill", "--freeze-connector"), "stage 1 has no connector to freeze"),
    ],
)
def test_flags_that_make_no_sense(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--model", "haplovl-8b", *words])
    assert message in capsys.readouterr().err


def test_a_partition_is_planned_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def first_layers(partition: str) -> list[list[str]]:
        path = tmp_path / "plan.json"
        words = ("--pipeline-model-parallel-size", "2", "4", "--zero-stage", "1", "--pipeline-partition", partition)
        plan(capsys, *SMALL, "--tensor-model-parallel-size", "2", *words, "--json", str(path))
        content = json.loads(path.read_text())
        refused = [record["constraints"].get("partition", "") for record in content["refused"]]
        assert ("make 2 stages, not 4" in "".join(refused)) == ("," not in partition and "." in partition)
        return [record["first_layers"] for record in content["possible"]]

    assert {tuple(layers) for layers in first_layers("post_decoder.9")} == {("embedding", "post_decoder.9")}
    auto, uniform = ({tuple(layers) for layers in first_layers(method)} for method in ("auto", "uniform"))
    assert auto and uniform and not auto & uniform


def test_a_file_of_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "stage1.yaml"
    path.write_text("model: haplovl-8b\nrecipe: distill\nbf16: false\nseq-length: 2048\nmax-tiles: 2\nzero-stage: 3\n")
    words = ("--gpus", "8", "--micro-batch-size", "1", "--context-parallel-size", "1", "--top", "1")
    status, from_file = plan(capsys, "--config", str(path), *words)
    flags = ("--model", "haplovl-8b", "--recipe", "distill", "--no-bf16", "--seq-length", "2048", "--max-tiles", "2")
    assert (status, from_file) == plan(capsys, *flags, *words)
    assert from_file.startswith("haplovl-8b, recipe distill, fp32; sequences of 2,048 tokens, 256 per step;")
    assert (
        ", bf16; sequences of 1,024 tokens"
        in plan(capsys, "--config", str(path), "--bf16", "--seq-length", "1024", *words)[1]
    )
    with pytest.raises(SystemExit):
        plan(capsys, "--gpus", "8")
    assert "no model is named" in capsys.readouterr().err


def test_a_batch_in_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_prefix: str) -> None:
    """The number of sequences comes from the data's plan or from the document that the flags describe."""
    shutil.copytree(Path(tiny_prefix).parent, tmp_path / "data")
    words = ["--model", "haplovl-debug", "--gpus", "2", "--batch-unit", "samples", "--global-batch-size", "7"]
    words += ["--seq-length", "192", "--text-tokens", "20", "--trained-tokens", "10", "--top", "1"]
    # An image is one tile of 16 patches: five documents of 36 tokens fit.
    status, estimated = plan(capsys, *words)
    assert status == 0 and "2 per step (7 samples, if all are of the kind that is described; --data-path" in estimated
    _, planned = plan(capsys, *words, "--data-path", str(tmp_path / "data" / "train"))
    config = build_config(
        "finetune",
        "haplovl-debug",
        {("schedule", "batch_unit"): "samples", ("schedule", "global_batch_size"): 7, ("data", "seq_length"): 192},
    )
    sequences = build_loader((str(tmp_path / "data" / "train"),), config, num_steps=1, dp_rank=0, dp_size=1).sequences
    assert f", {sequences} per step (7 samples, by their pack plan)" in planned and sequences > 2
    # Of a batch that grows, the largest is planned for.
    (tmp_path / "ramp.yaml").write_text("rampup-batch-size: [1, 1, 60]")
    growing = plan(capsys, *words, "--data-path", str(tmp_path / "data" / "train"), "--config", f"{tmp_path}/ramp.yaml")
    assert growing == (0, planned)
