"""The recipe for one's own data, as a user starts it: JSON, images, a tiny CLIP and a tiny Llama in, an answer out."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from megatron_haplovl.config.presets import MODELS
from megatron_haplovl.conversion.hf_compatibility import language_config_of, vision_config_of
from megatron_haplovl.data.tokenizer import load_tokenizer
from tests.conftest import make_llava_dataset

REPOSITORY = Path(__file__).parents[2]
SETTINGS = (
    "train-iters: 2\nlr-warmup-iters: 1\nglobal-batch-size: 2\nmicro-batch-size: 1\neval-iters: 1\nzero-stage: 1\n"
)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, tiny_spm_model: Path) -> list[str]:
    """The command of a user who has everything."""
    folder = tmp_path_factory.mktemp("own data")
    dataset = make_llava_dataset(folder)
    model = dataclasses.replace(MODELS["haplovl-debug"], vocab_size=load_tokenizer(str(tiny_spm_model)).vocab_size)
    torch.manual_seed(0)
    CLIPVisionModel(vision_config_of(model)).save_pretrained(folder / "clip")
    llama = language_config_of(model)
    assert isinstance(llama, LlamaConfig)
    LlamaForCausalLM(llama).save_pretrained(folder / "llama")
    question = {"question_id": 0, "image": "a/0.png", "text": "What color is it?", "answer": "red", "type": "color"}
    (folder / "questions.jsonl").write_text(json.dumps(question) + "\n")
    (folder / "settings.yaml").write_text(SETTINGS)
    return [
        *(sys.executable, "-m", "examples.own_data.recipe", f"--run={folder / 'run'}"),
        *(f"--{name}={dataset.json}" for name in ("captions", "instructions", "heldout")),
        *(f"--questions={folder / 'questions.jsonl'}", f"--image-folder={dataset.image_folder}", "--workers=1"),
        *("--model=haplovl-debug", f"--vocab-size={model.vocab_size}", f"--tokenizer-model={tiny_spm_model}"),
        *(f"--vision-teacher={folder / 'clip'}", f"--language-model={folder / 'llama'}", "--device=cpu"),
        *("--launch=python", f"--settings={folder / 'settings.yaml'}"),
    ]


def run(words: list[str]) -> str:
    """Run the recipe; returns what it printed, both streams."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        words, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout[-5000:]
    return result.stdout


@pytest.mark.slow
def test_from_json_to_an_answer_and_again(words):
    folder = Path(words[3].removeprefix("--run="))
    output = run(words)
    phases = ["preprocess-instructions", "preprocess-captions", "preprocess-heldout"]
    phases += ["stage1", "align", "full", "export", "plot", "evaluate"]
    assert all(f"[{phase}] done in" in output for phase in phases)
    assert "What color is it?\n  -> " in output
    assert json.loads((folder / "evaluation.json").read_text())["count"] == 1
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["seconds"].keys() == set(phases)
    assert summary["teachers"] == {}
    assert (folder / "haplovl-hf" / "config.json").is_file()
    # A second run would keep everything.
    again = run([*words, "--dry-run"]).splitlines()
    assert again[: len(phases)] == [f"# {phase}: done before, kept" for phase in phases]
    assert [line for line in again[len(phases) :] if line.startswith("#")] == ["# at the end"] * 2
