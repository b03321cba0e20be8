"""The changes that docs/extending.md shows, applied to a copy of the package in their order, which then runs.

Planted once to see it fail: a heading with another number, a hunk whose context has changed, a term without its sum.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
# Heading of a row -> the most files of the package that it may touch, its use not counted.
LIMITS = {
    "A flag": 1,
    "A preset": 1,
    "A recipe": 1,
    "An input layout": 1,
    "A kind of data source": 2,
    "A weighted extra loss": 3,
    "A vision teacher": 2,
    "A stage with a model class of its own": 4,
    "A log sink": 2,
    "An attention backend": 3,
}
CHECKS = """
import sys, dataclasses, torch
from transformers import ChineseCLIPVisionConfig, ChineseCLIPVisionModel
from megatron_haplovl.config.cli import build_config
from megatron_haplovl.config.schema import LossConfig
from megatron_haplovl.conversion.hf_compatibility import vision_config_of
from megatron_haplovl.data.loader import open_sources
from megatron_haplovl.data.layouts.normalise import NormaliseOptions, normalise
from megatron_haplovl.data.records import RawRecord
from megatron_haplovl.losses.distillation import distillation_loss
from megatron_haplovl.losses.terms import distillation_terms
from megatron_haplovl.training.recipe import trained_parts
from megatron_haplovl.training.teacher import load_teacher

prefix, folder = sys.argv[1:]
assert build_config("finetune", "haplovl-7b-small-tiles", {}).model.vision.cells_per_tile == 256
adapt = build_config("finetune", "haplovl-debug", {("recipe", "recipe"): "adapt"})
assert trained_parts(adapt.recipe) == {"embedding", "connector"}

record = normalise(RawRecord("line 1", {"question": "Who?", "answer": "She."}), NormaliseOptions()).record
assert [message.text for message in record.messages] == ["Who?", "She."]

((whole,), (first,)) = ([share.source for share in open_sources((p,), adapt)] for p in (prefix, f"{prefix}@3"))
assert len(whole.counts(adapt.model.vision).tokens) == 24 and len(first.counts(adapt.model.vision).tokens) == 3
assert first.content_hash != whole.content_hash and (first.read(2).token_ids == whole.read(2).token_ids).all()

student, teacher = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 1.0]])
words = torch.eye(4)
sums = distillation_loss(student, teacher, words[:1], torch.tensor([0]), words, torch.zeros(1))
weighted = distillation_terms(LossConfig(length_loss_weight=0.5))
assert float(sums["length loss"]) == 16.0 and sums.keys() == {term.name for term in weighted}
assert {term.name: term.weight for term in weighted}["length loss"] == 0.5

names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size")
sizes = {name: getattr(vision_config_of(adapt.model), name) for name in names}
ChineseCLIPVisionModel(ChineseCLIPVisionConfig(**sizes)).save_pretrained(folder)
assert load_teacher(folder, adapt.model, -1).width == adapt.model.pre.hidden_size
"""


def sections() -> dict[str, str]:
    page = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
    return {part.split("\n", 1)[0]: part for part in re.split(r"^## ", page, flags=re.MULTILINE)[1:]}


def changes(section: str) -> list[tuple[str, str]]:
    """(kind of block, content), in order."""
    return re.findall(r"^```(diff|python)\n(.*?)^```", section, re.DOTALL | re.MULTILINE)


def files(section: str) -> set[str]:
    return set(re.findall(r"^(?:\+\+\+ b/|# )(megatron_haplovl/\S+\.py)$", section, re.MULTILINE))


def test_every_row_is_there_and_keeps_its_limit():
    assert {heading.partition(": ")[0] for heading in sections()} == LIMITS.keys()
    for heading, section in sections().items():
        name, _, count = heading.partition(": ")
        used_elsewhere = 1 if "and its use" in count else 0
        assert len(files(section)) - used_elsewhere == int(count.split()[0]) <= LIMITS[name], heading
        assert f"[{name}](#" in (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with all changes."""
    root = tmp_path_factory.mktemp("extended")
    shutil.copytree(REPOSITORY / "megatron_haplovl", root / "megatron_haplovl", ignore=shutil.ignore_patterns("__pyc*"))
    for heading, section in sections().items():
        for kind, content in changes(section):
            if kind == "python":
                path, body = content.split("\n", 1)
                target = root / path.removeprefix("# ")
                assert not target.exists(), heading
                target.write_text(body, encoding="utf-8")
                continue
            # Not as part of a repository that the folder may lie in.
            environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(root.parent)}
            applied = subprocess.run(
                ["git", "apply"], cwd=root, input=content, text=True, capture_output=True, env=environment
            )
            assert applied.returncode == 0, f"{heading}: {applied.stderr}"
    return root


def run(root: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(
        [sys.executable, *words], cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, result.stdout[-4000:]
    return result.stdout


def test_presets_recipes_layouts_sources_losses_and_teachers(extended: Path, tiny_prefix: str, tmp_path: Path):
    run(extended, "-c", CHECKS, tiny_prefix, str(tmp_path))


def test_a_stage_a_flag_a_sink_and_a_backend_in_one_run(extended: Path, tmp_path: Path):
    printed = run(
        extended,
        *("-m", "megatron_haplovl.probe", "--model", "haplovl-debug", "--mock-data", "--seq-length", "64"),
        *(
            "--train-iters",
            "2",
            "--global-batch-size",
            "1",
            "--num-workers",
            "0",
            "--log-interval",
            "1",
            "--device",
            "cpu",
        ),
        *("--run-name", "trial", "--csv-file", str(tmp_path / "values.csv"), "--attention-backend", "rows"),
    )
    assert "run: trial | ranks: 1" in printed and "attention backend: rows" in printed
    losses = [line for line in (tmp_path / "values.csv").read_text().splitlines() if ",lm loss," in line]
    assert [line.split(",")[0] for line in losses] == ["1", "2"]
