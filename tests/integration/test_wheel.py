"""The wheel, where there is no checkout: what it holds, its commands, and a training from it."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

import megatron_haplovl
from megatron_haplovl.conversion import remote_code

REPOSITORY = Path(__file__).parents[2]
COMMANDS = ("preprocess", "merge", "convert", "evaluate", "generate", "plan", "verify", "inspect", "report")
SIZES = (
    "--model haplovl-debug --patch-size 8 --image-size 16 --pre-num-layers 1 --pre-hidden-size 32 "
    "--pre-ffn-hidden-size 48 --pre-num-attention-heads 2 --post-num-layers 1 --post-hidden-size 48 "
    "--post-ffn-hidden-size 64 --post-num-attention-heads 4 --post-num-key-value-heads 2 --seq-length 256 --device cpu "
    "--vocab-size 512 --train-iters 1 --global-batch-size 2 --lr-warmup-iters 0 --num-workers 0"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, because building leaves files beside the sources, and finds those of an earlier build."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(
        REPOSITORY / "megatron_haplovl",
        folder / "source/megatron_haplovl",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder / "source")
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    run([sys.executable, "-m", "pip", "wheel", "--quiet", *offline, str(folder / "source")], folder, os.environ)
    (path,) = folder.glob("*.whl")
    return path


def run(words: list[str], cwd: Path, environment: Mapping[str, str], given: str = "") -> str:
    """Run a command, and give it something to read; returns what it printed, both streams."""
    result = subprocess.run(
        words,
        cwd=cwd,
        env=environment,
        input=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, f"{words}\n{result.stdout[-5000:]}"
    return result.stdout


def test_the_wheel_holds_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata_file,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(metadata_file).decode()
        entries = configparser.ConfigParser()
        entries.read_string(archive.read(metadata_file.replace("METADATA", "entry_points.txt")).decode())
    sources = {
        path.relative_to(REPOSITORY).as_posix()
        for path in (REPOSITORY / "megatron_haplovl").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if ".dist-info/" not in name} == sources
    assert {"megatron_haplovl/py.typed", "megatron_haplovl/data/templates/vicuna_v1.jinja"} <= sources
    assert f"\nVersion: {megatron_haplovl.__version__}\n" in metadata
    assert set(entries["console_scripts"]) == {f"haplovl-{command}" for command in COMMANDS}
    assert re.search(r"Requires-Dist: deepspeed.*<", metadata)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds the wheel, and sees what else is installed here, but no checkout."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", symlinks=True)
    # A path in a .pth file is added without reading the .pth files there, so not that of an editable install either.
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()))
    python = str(folder / "venv/bin/python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    run([*pip, str(wheel)], folder, os.environ)
    return folder


# One process for all, because importing torch takes most of the time.
_HELP = """
import contextlib, io, runpy, sys
import megatron_haplovl
print(megatron_haplovl.__file__)
for start, name in (line.split(" ", 1) for line in sys.stdin.read().splitlines()):
    sys.argv = [name, "--help"]
    with contextlib.suppress(SystemExit):
        if start == "script":
            runpy.run_path(name, run_name="__main__")
        else:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_from_records_to_an_export_without_a_checkout(installed: Path, tiny_spm_model: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    bin_folder = installed / "venv/bin"

    def start(command: str, *words: str, given: str = "") -> str:
        first, *rest = command.split()
        return run([str(bin_folder / first), *rest, *words], installed, environment, given)

    started = [f"script {bin_folder}/haplovl-{command}" for command in COMMANDS]
    started += [f"module megatron_haplovl.{stage}" for stage in ("pretrain", "finetune")]
    shown = start("python -c", _HELP, given="\n".join(started))
    assert Path(shown.splitlines()[0]).is_relative_to(installed)
    for command in COMMANDS:
        assert f"usage: haplovl-{command} " in shown
    assert "\n    haplovl-plan --model haplovl-8b --gpus 64 " in shown
    for stage in ("pretrain", "finetune"):
        assert f"usage: deepspeed --module megatron_haplovl.{stage} " in shown

    turns = [{"from": "human", "value": "What color is the circle?"}, {"from": "gpt", "value": "The circle is red."}]
    (installed / "records.json").write_text(json.dumps([{"id": str(i), "conversations": turns} for i in range(2)]))
    tokenizer = f"--tokenizer-model {tiny_spm_model} --chat-template vicuna_v1"
    start(f"haplovl-preprocess --input records.json --output-prefix train --workers 2 {tokenizer}")
    start(f"python -m deepspeed.launcher.runner --num_gpus 1 --module megatron_haplovl.pretrain {SIZES} --mock-data")
    start(
        f"python -m torch.distributed.run --nproc_per_node 1 -m megatron_haplovl.finetune {SIZES} --mock-data "
        "--save stage2"
    )
    start(f"haplovl-convert export --load stage2 --save hf {tokenizer}")
    code = {path.name: path.read_text() for path in (installed / "hf").glob("*.py")}
    assert code == remote_code._sources()
    template = REPOSITORY / "megatron_haplovl/data/templates/vicuna_v1.jinja"
    assert (installed / "hf/chat_template.jinja").read_text() == template.read_text()
