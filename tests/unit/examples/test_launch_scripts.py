"""The launch scripts start what their variables ask for, with a recipe's settings, or say what is missing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_haplovl.config.cli import parse_args
from megatron_haplovl.config.presets import MODELS
from megatron_haplovl.config.schema import Config
from tests.fixtures.stand_in_launchers import JOB, REPOSITORY, launched, start

STAGE1 = {"RECIPE": "examples/recipes/haplovl-7b/stage1.yaml", "SAVE": "my runs/1", "TOKENIZER_MODEL": "my llm"}
STAGE1_FLAGS = [
    *("--vision-teacher", "clip", "--language-model", "llm", "--data-path", "my data/instructions"),
    *("--aux-data-path", "my data/captions", "--valid-data-path", "my data/heldout", "--eval-interval", "1000"),
]
STAGE2 = {"RECIPE": "examples/recipes/haplovl-7b/instructions.yaml", "SAVE": "s", "TOKENIZER_MODEL": "my llm"}
STAGE2_FLAGS = ["--pretrained-checkpoint", "a", "--language-model", "llm", "--data-path", "d"]
TORCHRUN = {"NNODES": "4", "NODE_RANK": "3", "MASTER_ADDR": "node0"}
TORCHRUN_HERE, RESTARTS = "torchrun --nproc_per_node", "--max_restarts 3 --signals_to_handle SIGQUIT"


def config_of(words: list[str], script: str, stage: str) -> Config:
    return parse_args(stage, argv=words[words.index(script) + 1 :])


@pytest.mark.parametrize("model", ["haplovl-7b", "haplovl-8b"])
def test_stage_1(tmp_path, model):
    recipe = f"examples/recipes/{model}/stage1.yaml"
    words = launched(tmp_path, "ds_pretrain_haplovl.sh", {**STAGE1, "RECIPE": recipe}, *STAGE1_FLAGS)
    config = config_of(words, "pretrain_haplovl.py", "pretrain")
    assert config.model.post == MODELS[model].post
    assert (config.schedule.train_iters, config.schedule.global_batch_size) == (40000, 256)
    assert config.schedule.lr_warmup_iters == 2000
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.adam_beta1, optimizer.adam_beta2) == (1e-4, 0.9, 0.95)
    assert optimizer.weight_decay == 1e-4
    data = config.data
    assert (data.data_path, data.aux_data_path) == (("my data/instructions",), ("my data/captions",))
    assert (data.valid_data_path, data.tokenizer_model) == (("my data/heldout",), "my llm")
    assert config.checkpoint.save == config.checkpoint.load == "my runs/1"


@pytest.mark.parametrize(
    ("part", "recipe", "lr", "batch"), [("align", "align", 1e-3, 256), ("instructions", "full", 2e-5, 128)]
)
def test_stage_2(tmp_path, part, recipe, lr, batch):
    variables = {**STAGE2, "RECIPE": f"examples/recipes/haplovl-7b/{part}.yaml"}
    words = launched(tmp_path, "ds_finetune_haplovl.sh", variables, *STAGE2_FLAGS)
    config = config_of(words, "finetune_haplovl.py", "finetune")
    assert (config.recipe.recipe, config.optimizer.lr) == (recipe, lr)
    assert (config.schedule.global_batch_size, config.optimizer.adam_beta2) == (batch, 0.98)
    assert (config.optimizer.weight_decay, config.schedule.lr_decay_style) == (0.0, "cosine")
    assert (config.init.pretrained_checkpoint, config.data.tokenizer_model) == ("a", "my llm")
    assert config.checkpoint.save == config.checkpoint.load == "s"


@pytest.mark.parametrize(
    ("script", "entry", "stage", "variables", "needed"),
    [
        ("ds_pretrain_haplovl.sh", "pretrain_haplovl.py", "pretrain", STAGE1, STAGE1_FLAGS),
        ("ds_finetune_haplovl.sh", "finetune_haplovl.py", "finetune", STAGE2, STAGE2_FLAGS),
        ("ds_try_launch.sh", "finetune_haplovl.py", "finetune", {}, []),
    ],
)
def test_flags_on_the_command_line_win(tmp_path, script, entry, stage, variables, needed):
    sizes = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--context-parallel-size", "2"]
    flags = [*needed, *sizes, "--zero-stage", "3", "--save", "another run"]
    config = config_of(launched(tmp_path, script, variables, *flags), entry, stage)
    parallel = config.parallel
    assert (parallel.tensor_model_parallel_size, parallel.context_parallel_size, parallel.zero_stage) == (2, 2, 3)
    assert parallel.sequence_parallel
    assert config.checkpoint.save == "another run"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, f"{TORCHRUN_HERE} gpu {RESTARTS} --standalone"),
        ({"NUM_GPUS": "2", "MAX_RESTARTS": "0"}, f"{TORCHRUN_HERE} 2 {RESTARTS.replace('3', '0')} --standalone"),
        ({"LAUNCHER": "deepspeed"}, "deepspeed --master_port 29500"),
        (
            {"LAUNCHER": "deepspeed", "NUM_GPUS": "2", "MASTER_PORT": "3"},
            "deepspeed --master_port 3 --num_gpus 2",
        ),
        ({"HOSTFILE": "LICENSE"}, "deepspeed --master_port 29500 --hostfile LICENSE"),
        (
            {"HOSTFILE": "LICENSE", "MASTER_ADDR": "ib0"},
            "deepspeed --master_port 29500 --hostfile LICENSE --master_addr ib0",
        ),
        (
            {"HOSTFILE": "LICENSE", "MASTER_ADDR": "ib0", "NODE_RANK": "1"},
            "deepspeed --master_port 29500 --hostfile LICENSE --master_addr ib0 --no_ssh --node_rank 1",
        ),
        (
            TORCHRUN,
            f"{TORCHRUN_HERE} gpu {RESTARTS} --nnodes 4 --rdzv_backend c10d --rdzv_endpoint node0:29500 "
            "--rdzv_conf is_host=0",
        ),
        (
            {**TORCHRUN, "NODE_RANK": "0", "NODE_ADDR": "10.0.0.7", "NUM_GPUS": "4"},
            f"{TORCHRUN_HERE} 4 {RESTARTS} --nnodes 4 --rdzv_backend c10d --rdzv_endpoint node0:29500 "
            "--rdzv_conf is_host=1 --local_addr 10.0.0.7",
        ),
        (
            {**TORCHRUN, "NNODES": "2:4"},
            f"{TORCHRUN_HERE} gpu {RESTARTS} --nnodes 2:4 --rdzv_backend c10d --rdzv_endpoint node0:29500 "
            "--rdzv_conf is_host=0",
        ),
    ],
)
def test_launchers(tmp_path, variables, words):
    found = launched(tmp_path, "ds_try_launch.sh", variables)
    assert found[: found.index("finetune_haplovl.py")] == words.split()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"LAUNCHER": "mpirun"}, "LAUNCHER=mpirun is neither deepspeed nor torchrun"),
        ({"LAUNCHER": "deepspeed", "NNODES": "2"}, "NNODES=2 is for LAUNCHER=torchrun"),
        ({"HOSTFILE": "no such file"}, "HOSTFILE=no such file is not a file"),
        ({"HOSTFILE": "LICENSE", "NODE_RANK": "0"}, "MASTER_ADDR: address of machine 0"),
        ({"NODE_RANK": "1"}, "NODE_RANK=1, but there is only NNODES=1"),
        ({**TORCHRUN, "NODE_RANK": "4"}, "NODE_RANK=4, but there is only NNODES=4"),
        ({**TORCHRUN, "NNODES": "2:4", "NODE_RANK": "4"}, "NODE_RANK=4, but there is only NNODES=2:4"),
        ({**TORCHRUN, "NODE_RANK": ""}, "NODE_RANK: which of the 4 machines this is"),
        ({**TORCHRUN, "MASTER_ADDR": ""}, "MASTER_ADDR: address of machine 0"),
        ({**TORCHRUN, "LAUNCHER": "torchrun", "HOSTFILE": "LICENSE"}, "torchrun reads no HOSTFILE"),
    ],
)
def test_what_would_start_something_else_is_refused(tmp_path, variables, message):
    result = start(tmp_path, ["bash", "examples/ds_try_launch.sh"], variables)
    assert result.returncode != 0
    assert result.stdout == ""
    assert message in result.stderr


@pytest.mark.parametrize("missing", ["RECIPE", "SAVE", "TOKENIZER_MODEL"])
def test_a_missing_variable_is_named(tmp_path, monkeypatch, missing):
    monkeypatch.delenv("TOKENIZER_MODEL", raising=False)
    for script, variables in (("ds_pretrain_haplovl.sh", STAGE1), ("ds_finetune_haplovl.sh", STAGE2)):
        given = {name: value for name, value in variables.items() if name != missing}
        result = start(tmp_path, ["bash", f"examples/{script}"], given)
        assert result.returncode != 0
        assert result.stdout == ""
        assert f"{missing}: f" in result.stderr


def submit(folder: Path, variables: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """Run the batch script as slurmd does: a copy, from the folder of submission."""
    script = shutil.copy(REPOSITORY / "examples" / "slurm" / "train.sbatch", folder / "slurm_script")
    return start(folder, ["bash", str(script), *words], {**JOB, **variables})


def test_slurm_starts_torchrun_on_every_machine(tmp_path):
    result = submit(tmp_path, STAGE1, "examples/ds_pretrain_haplovl.sh", "--metrics-file", "my metrics")
    assert result.returncode == 0, result.stderr
    for rank, node in enumerate(("node7", "node9")):
        words = (
            f"{TORCHRUN_HERE} gpu {RESTARTS} --nnodes 2 --rdzv_backend c10d --rdzv_endpoint node7:24567 "
            f"--rdzv_conf is_host={1 - rank} --local_addr {node} pretrain_haplovl.py"
        )
        assert "\n".join(words.split()) in result.stdout
    assert result.stdout.count("torchrun\n") == 2
    assert result.stdout.count("--save\nmy runs/1\n") == 2
    assert result.stdout.count("--metrics-file\nmy metrics\n") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "usage: sbatch"),
        (["examples/no_such.sh"], f"there is no launch script examples/no_such.sh in {REPOSITORY}"),
        (["examples/ds_pretrain_haplovl.sh"], "RECIPE: file of settings"),
    ],
)
def test_a_slurm_job_fails_with_what_it_started(tmp_path, words, message):
    result = submit(tmp_path, {}, *words)
    assert result.returncode != 0
    assert message in result.stderr
