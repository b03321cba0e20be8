"""The users' commands, as users give them, on a tiny data set and tiny pretrained models: JSON in, an answer out.

One chain of commands runs once; the tests look at what each command left behind.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from megatron_haplovl.checkpoint.pieces import open_checkpoint
from megatron_haplovl.data.tokenizer import load_tokenizer
from tests.conftest import make_llava_dataset
from tests.distributed.launch import run_program
from tests.forks import run_copies
from tests.metrics_files import logged
from tests.processes import REPOSITORY, output_of

SIZES = (
    "--model haplovl-debug --patch-size 8 --image-size 16 --image-aspect-ratio anyres --max-tiles 2 --image-newline "
    "--pre-num-layers 2 --pre-hidden-size 32 --pre-ffn-hidden-size 48 --pre-num-attention-heads 2 "
    "--post-num-layers 2 --post-hidden-size 48 --post-ffn-hidden-size 64 --post-num-attention-heads 4 "
    "--post-num-key-value-heads 2 --seq-length 256 --device cpu"
)
SCHEDULE = "--train-iters 4 --global-batch-size 4 --lr 1e-3 --lr-warmup-iters 1 --log-interval 1 --num-workers 1"


def run(command: str, *, fails: bool = False, ranks: int = 1) -> str:
    """Run a command in the repository; returns what it printed, both streams.

    Launchers are started as users start them. Python programs are copies of a process that has imported everything.
    """
    first, *words = command.split()
    if first == sys.executable and ranks > 1:
        return run_program(words[0], ranks, *words[1:])
    if first == sys.executable:
        (code,), output = run_copies(words[0], words[1:], timeout=300)
    else:
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
        }
        code, output = output_of([first, *words], environment=environment, timeout=300)
    assert (code != 0) == fails, f"{command}\n{output[-5000:]}"
    return output


def save_teachers(folder: Path, vocab_size: int) -> None:
    """A random CLIP and a random Llama that fit SIZES, in `folder`/clip and `folder`/llama."""
    torch.manual_seed(0)
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
    ).save_pretrained(folder / "clip")
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    ).save_pretrained(folder / "llama")


@dataclass(frozen=True)
class Chain:
    """What every command printed, and the folder that everything is in."""

    folder: Path
    output: dict[str, str]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, tiny_spm_model: Path) -> Chain:
    """Preprocess, stage 1, align, full, export, generate, evaluate."""
    folder = tmp_path_factory.mktemp("end_to_end")
    dataset = make_llava_dataset(folder)
    vocab_size = load_tokenizer(str(tiny_spm_model)).vocab_size
    save_teachers(folder, vocab_size)
    questions = [
        {"question_id": i, "image": f"a/{i}.png", "text": "What color is it?", "answer": "red", "type": "color"}
        for i in range(3)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))

    sizes = f"{SIZES} --vocab-size {vocab_size}"
    data = f"--tokenizer-model {tiny_spm_model} --data-path {folder}/train --valid-data-path {folder}/train"
    out = {}
    out["preprocess"] = run(
        f"{sys.executable} tools/preprocess_data.py --input {dataset.json} --image-folder {dataset.image_folder} "
        f"--output-prefix {folder}/train --tokenizer-model {tiny_spm_model} --chat-template vicuna_v1 --workers 2"
    )
    out["stage 1"] = run(
        f"deepspeed --num_gpus 2 pretrain_haplovl.py {sizes} {data} {SCHEDULE} --aux-data-path {folder}/train "
        f"--vision-teacher {folder}/clip --language-model {folder}/llama --zero-stage 2 --save {folder}/stage1 "
        f"--metrics-file {folder}/stage1.jsonl"
    )
    out["stage 1, pipelined"] = run(
        f"{sys.executable} pretrain_haplovl.py {sizes} {data} {SCHEDULE} --aux-data-path {folder}/train "
        f"--vision-teacher {folder}/clip --language-model {folder}/llama --pipeline-model-parallel-size 2 "
        f"--save {folder}/stage1_pipelined --metrics-file {folder}/stage1_pipelined.jsonl",
        ranks=2,
    )
    out["align"] = run(
        f"torchrun --nproc_per_node 2 finetune_haplovl.py {sizes} {data} {SCHEDULE} --recipe align --zero-stage 3 "
        f"--pretrained-checkpoint {folder}/stage1 --language-model {folder}/llama --save {folder}/align"
    )
    out["full"] = run(
        f"{sys.executable} finetune_haplovl.py {sizes} {data} {SCHEDULE} --pretrained-checkpoint {folder}/align --bf16 "
        f"--save {folder}/full --metrics-file {folder}/full.jsonl"
    )
    out["full, pipelined"] = run(
        f"{sys.executable} finetune_haplovl.py {sizes} {data} {SCHEDULE} --bf16 "
        f"--pretrained-checkpoint {folder}/align --pipeline-model-parallel-size 2 --save {folder}/full_pipelined "
        f"--metrics-file {folder}/full_pipelined.jsonl",
        ranks=2,
    )
    out["export"] = run(
        f"{sys.executable} tools/convert_checkpoint.py export --load {folder}/full --save {folder}/hf --verify"
    )
    out["generate"] = run(
        f"{sys.executable} tools/generate.py --model {folder}/hf --image {dataset.image_folder}/a/0.png "
        "--prompt Color? --max-new-tokens 4"
    )
    out["evaluate"] = run(
        f"{sys.executable} tools/evaluate.py --model {folder}/hf --question-file {folder}/questions.jsonl "
        f"--image-folder {dataset.image_folder} --answers-file {folder}/answers.jsonl --json {folder}/summary.json "
        "--max-new-tokens 4"
    )
    return Chain(folder, out)


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    reader = open_checkpoint(folder / "global_step4")
    return {name: reader.get(name) for name in reader.names()}


def test_stage_1_reports_three_losses_and_a_held_out_evaluation(chain):
    lines = logged(chain.folder / "stage1.jsonl")
    training = [line for line in lines if "loss" in line]
    assert [line["iteration"] for line in training] == [1, 2, 3, 4]
    for line in training:
        assert line["loss"] == pytest.approx(line["vision loss"] + line["feature loss"] + line["ctp loss"])
    held_out = [line for line in lines if "valid ctp loss" in line]
    assert [line["iteration"] for line in held_out] == [0, 4]
    assert held_out[1]["valid ctp loss"] < held_out[0]["valid ctp loss"]
    assert "consumed samples: 16 |" in chain.output["stage 1"]


def test_the_page_of_log_columns_names_what_is_logged(chain):
    text = (REPOSITORY / "docs/log_columns.md").read_text()
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    table, terms, of_validation = (
        sections[name] for name in ("The training line", "Loss terms", "The validation line")
    )
    rows = re.findall(r"^\| (`[^|]+) \| ([^|]+)", table, re.MULTILINE)
    named = {column: meaning for names, meaning in rows for column in re.findall(r"`([^`/]+)`", names)}
    # A flag, several ranks or a known device add these.
    conditional = re.compile(r"with `--|of several ranks|.*has no such column")
    columns = {column for column, meaning in named.items() if not conditional.match(meaning)}
    of_stage = {stage: set(re.findall(rf"^\| `([^`]+)` \| {stage} \|", terms, re.MULTILINE)) for stage in (1, 2)}
    for stage, name in ((1, "stage1"), (2, "full")):
        lines = logged(chain.folder / f"{name}.jsonl")
        training, of_sources = _columns(next(line for line in lines if "loss" in line))
        held_out, _ = _columns(next(line for line in lines if "loss" not in line))
        assert columns | of_stage[stage] <= training <= named.keys() | of_stage[stage]
        of_stage_1 = set(re.findall(r"^\| `([^`]+)` \|", sections["The validation line"], re.MULTILINE))
        assert held_out == {f"valid {term}" for term in of_stage[stage]} | (of_stage_1 if stage == 1 else set())
        # Stage 1 has two sources, main and auxiliary samples, stage 2 has one.
        assert of_sources == (
            set(re.findall(r"`([^`]+)/NAME`", sections["Losses by source"])) - {"lm loss", "valid lm loss"}
            if stage == 1
            else set()
        )


def _columns(line):
    """Names in a line of metrics: the run's, and those of a source, without the source's name."""
    names = line.keys() - {"iteration", "time"}
    return {name for name in names if "/" not in name}, {name.split("/")[0] for name in names if "/" in name}


def test_hand_over_says_what_was_loaded_dropped_and_initialised(chain):
    folder = chain.folder
    for stage, part, count, origin in (
        ("stage 1", "pre_decoder", 32, f"{folder}/clip"),
        ("stage 1", "embeddings", 1, f"skipped: has no counterpart ({folder}/clip)"),
        ("stage 1", "distillation", 5, "newly initialised"),
        ("align", "pre_decoder", 32, f"{folder}/stage1/global_step4"),
        ("align", "post_decoder", 18, f"{folder}/llama"),
        ("align", "connector", 1, "newly initialised"),
        ("align", "distillation", 5, "dropped: stage 1 only"),
        ("full", "connector", 1, f"{folder}/align/global_step4"),
    ):
        assert re.search(rf"{part} +{count} tensors  {re.escape(origin)}", chain.output[stage]), (stage, part)


@pytest.mark.parametrize(
    ("name", "tolerance", "weights"), [("stage1", 1e-5, (0.0, 1e-4)), ("full", 1e-2, (2**-7, 5e-3))]
)
def test_a_pipelined_run_loads_trains_evaluates_and_saves_the_same(chain, name, tolerance, weights):
    """Stage 1 in fp32 from pretrained folders, stage 2 in bf16 from a checkpoint."""
    direct, pipelined = (logged(chain.folder / f"{run}.jsonl") for run in (name, f"{name}_pipelined"))
    for ours, theirs in zip(direct, pipelined, strict=True):
        for key in ours.keys() - {"learning rate"}:
            if "loss" in key or key == "iteration":
                assert theirs[key] == pytest.approx(ours[key], rel=tolerance), key
    table = "initial weights:" + chain.output[{"stage1": "stage 1", "full": "full"}[name]].split("initial weights:")[1]
    assert table.split("parameters:")[0] in chain.output[{"stage1": "stage 1", "full": "full"}[name] + ", pipelined"]
    saved, expected = (saved_weights(chain.folder / run) for run in (f"{name}_pipelined", name))
    assert saved.keys() == expected.keys()
    for parameter, weight in expected.items():
        torch.testing.assert_close(saved[parameter], weight, rtol=weights[0], atol=weights[1], msg=parameter)


def test_each_recipe_trained_what_it_says(chain):
    stage1, align, full = (saved_weights(chain.folder / stage) for stage in ("stage1", "align", "full"))
    llama = LlamaForCausalLM.from_pretrained(chain.folder / "llama").state_dict()
    assert torch.equal(stage1["embedding.text.weight"], llama["model.embed_tokens.weight"])
    assert torch.equal(align["post_decoder.0.mlp.up_proj.weight"], llama["model.layers.0.mlp.up_proj.weight"])
    for name in stage1.keys() & align.keys():
        assert torch.equal(stage1[name], align[name]), name
    assert all((align[name] != full[name].float()).any() for name in align)


def test_export_generates_and_is_evaluated(chain):
    assert "difference of a logit from the training model" in chain.output["export"]
    assert chain.output["generate"].strip()
    summary = json.loads((chain.folder / "summary.json").read_text())
    assert (summary["count"], summary["majority_accuracy"]) == (3, 1.0)
    assert len((chain.folder / "answers.jsonl").read_text().splitlines()) == 3


def test_stage_2_from_stage_1_without_a_language_model_is_refused(chain):
    out = run(
        f"{sys.executable} finetune_haplovl.py {SIZES} --vocab-size {load_vocab(chain)} "
        f"--data-path {chain.folder}/train {SCHEDULE} --pretrained-checkpoint {chain.folder}/stage1",
        fails=True,
    )
    assert "error: no weights for final_norm, lm_head, post_decoder" in out and "give --pretrained-checkpoint" in out
    assert "Traceback" not in out


def test_latest_that_names_a_missing_folder_is_refused(chain, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "latest").write_text("global_step99")
    for flag in (f"--load {broken}", f"--pretrained-checkpoint {broken}"):
        out = run(
            f"{sys.executable} finetune_haplovl.py {SIZES} --vocab-size {load_vocab(chain)} --data-path "
            f"{chain.folder}/train {SCHEDULE} --language-model {chain.folder}/llama "
            f"--vision-teacher {chain.folder}/clip {flag}",
            fails=True,
        )
        assert "global_step99" in out and "latest" in out


def test_a_truncated_data_file_is_refused_at_the_start(chain, tmp_path):
    for path in chain.folder.glob("train*"):
        if path.is_file():
            shutil.copy(path, tmp_path / path.name)
    with open(tmp_path / "train.bin", "r+b") as file:
        file.truncate((tmp_path / "train.bin").stat().st_size - 40)
    out = run(
        f"{sys.executable} finetune_haplovl.py {SIZES} --vocab-size {load_vocab(chain)} --data-path {tmp_path}/train "
        f"{SCHEDULE} --language-model {chain.folder}/llama --vision-teacher {chain.folder}/clip",
        fails=True,
    )
    assert "train.bin" in out


def load_vocab(chain: Chain) -> int:
    """Rows of the tiny language model's matrix."""
    return json.loads((chain.folder / "llama" / "config.json").read_text())["vocab_size"]


@pytest.mark.parametrize("script", ["pretrain_haplovl.py", "finetune_haplovl.py"])
def test_help_and_mock_data_need_no_files(script):
    assert "--global-batch-size N" in run(f"{sys.executable} {script} --help")
    out = run(f"{sys.executable} {script} {SIZES} {SCHEDULE} --mock-data")
    assert "iteration        4/       4" in out
