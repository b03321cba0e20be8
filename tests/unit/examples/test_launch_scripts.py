"""The launch scripts for GPUs give flags that the entry scripts accept, with the paper's settings."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from megatron_haplovl.config.cli import parse_args
from megatron_haplovl.config.schema import Config

REPOSITORY = Path(__file__).parents[3]


def launched(folder: Path, script: str, **variables: str) -> list[str]:
    """The words that a launch script gives to `deepspeed`."""
    fake = folder / "deepspeed"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    environment = {**os.environ, **variables, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", str(REPOSITORY / "examples" / script)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def config_of(words: list[str], script: str, stage: str) -> Config:
    return parse_args(stage, argv=words[words.index(script) + 1 :])


@pytest.mark.parametrize("model", ["haplovl-7b", "haplovl-8b"])
def test_stage_1(tmp_path, model):
    variables = {"MODEL": model, "DATA": "d", "SAVE": "s", "VISION_TEACHER": "clip", "LANGUAGE_MODEL": "llm"}
    words = launched(tmp_path, "ds_pretrain_haplovl.sh", **variables)
    assert words[:2] == ["--num_gpus", "8"]
    config = config_of(words, "pretrain_haplovl.py", "pretrain")
    assert (config.schedule.train_iters, config.schedule.global_batch_size) == (40000, 256)
    assert config.schedule.lr_warmup_iters == 2000
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.adam_beta1, optimizer.adam_beta2) == (1e-4, 0.9, 0.95)
    assert optimizer.weight_decay == 1e-4
    assert config.data.aux_data_path == ("d/captions",)


@pytest.mark.parametrize(("phase", "lr"), [("align", 1e-3), ("full", 2e-5)])
def test_stage_2(tmp_path, phase, lr):
    variables = {"PHASE": phase, "START": "a", "DATA": "d", "SAVE": "s", "TRAIN_ITERS": "10", "LANGUAGE_MODEL": "llm"}
    words = launched(tmp_path, "ds_finetune_haplovl.sh", HOSTFILE="hosts", **variables)
    assert words[2:4] == ["--hostfile", "hosts"]
    config = config_of(words, "finetune_haplovl.py", "finetune")
    assert (config.recipe.recipe, config.optimizer.lr) == (phase, lr)
    assert (config.schedule.global_batch_size, config.optimizer.adam_beta2) == (128, 0.98)
    assert (config.optimizer.weight_decay, config.schedule.lr_decay_style) == (0.0, "cosine")


def test_a_missing_variable_is_named(tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as error:
        launched(tmp_path, "ds_finetune_haplovl.sh")
    assert "PHASE" in error.value.stderr
