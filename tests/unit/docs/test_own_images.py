"""docs/own_images_one_evening.md: the programs take its commands, and its script makes usable records."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from transformers import CLIPVisionConfig, Qwen2Config

from megatron_haplovl.config.cli import parse_args
from megatron_haplovl.config.stages import FINETUNE
from megatron_haplovl.conversion.hf_compatibility import check_language_config, check_vision_config
from megatron_haplovl.data.layouts.normalise import NormaliseOptions, normalise
from megatron_haplovl.data.readers.inputs import read
from megatron_haplovl.evaluation.questions import load_questions
from tests.unit.test_documented_commands import Command, check

REPOSITORY = Path(__file__).parents[3]
NAME = "docs/own_images_one_evening.md"
PAGE = (REPOSITORY / NAME).read_text(encoding="utf-8")
BLOCKS = re.findall(r"```shell\n(.*?)```", PAGE, re.DOTALL)
# Instead of running a program, print its words.
STUBS = """
python() { printf '%s\\x1f' python "$@"; echo; }
deepspeed() { printf '%s\\x1f' deepspeed "$@"; echo; }
"""


def words_of(script: str) -> list[list[str]]:
    """The commands of a shell script, as bash expands them."""
    result = subprocess.run(["bash", "-euc", STUBS + script], capture_output=True, text=True, check=True)
    return [line.split("\x1f")[:-1] for line in result.stdout.splitlines()]


def test_the_trainings_take_their_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    trainings = [words for words in words_of("".join(BLOCKS[:-1])) if words[0] == "deepspeed"]
    configs = []
    for words in trainings:
        (script,) = (word for word in words if word.endswith("_haplovl.py"))
        stage = script.removesuffix("_haplovl.py")
        configs.append(parse_args(stage, argv=words[words.index(script) + 1 :]))
    assert [config.recipe.recipe for config in configs] == ["distill", "align", "full"]
    assert [config.init.pretrained_checkpoint for config in configs] == [None, "my/stage1", "my/align"]


def test_every_program_takes_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's first command runs its own script."""
    monkeypatch.chdir(REPOSITORY)
    first, *commands = words_of("".join(BLOCKS[:-1]))
    assert first == ["python", "my/records.py"]
    for words in commands:
        check(Command(NAME, tuple(words), {}), tmp_path)
    others = [words for words in commands if words[0] == "python"]
    programs = {words[1] if words[1] != "-m" else words[2].replace(".", "/") + ".py" for words in others}
    assert len(programs) == 8 and all((REPOSITORY / program).is_file() for program in programs)
    with pytest.raises(SystemExit):
        check(Command(NAME, (*others[0], "--no-such-flag"), {}), tmp_path)


def test_the_script_makes_records_and_questions(tmp_path: Path) -> None:
    rows: list[tuple[object, ...]] = []
    for i in range(20):
        path = tmp_path / "my" / "images" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
        # One image has no caption.
        rows += [(path.name, "", f"Number {i}.")] if i != 5 else []
        rows += [(path.name, "Which?", i), (path.name, "Is it odd?", i % 2)]
    with open(tmp_path / "my" / "data.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "question", "answer"), *rows])
    (script,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    counts = {path.stem: len(list(read([path]))) for path in (tmp_path / "my").glob("*.json")}
    assert counts == {"captions": 17, "instructions": 36, "texts": 34} | {
        "heldout_captions": 2,
        "heldout_instructions": 4,
        "heldout_texts": 4,
    }
    records = [
        normalise(raw, NormaliseOptions()).record for path in (tmp_path / "my").glob("*.json") for raw in read([path])
    ]
    assert sum(len(record.media) for record in records) == 59
    trained = {r["image"] for r in json.loads((tmp_path / "my" / "instructions.json").read_text())}
    questions = load_questions(tmp_path / "my" / "questions.jsonl", tmp_path / "my" / "images")
    assert len(questions) == 4 and not {image.name for q in questions for image in q.images} & trained


def test_the_sizes_for_pretrained_models_are_those_of_the_two_models(tmp_path: Path) -> None:
    preprocess, words = words_of(BLOCKS[-1] + 'python "${MODEL[@]}"; python "${MODEL[@]}" "${SIZES[@]}"')
    needed = ("--input", "i", "--tokenizer-model", "t", "--chat-template", "plain", "--output-prefix", "o")
    check(Command(NAME, ("python", "tools/preprocess_data.py", *needed, *preprocess[1:]), {}), tmp_path)
    model = parse_args("finetune", argv=[*words[1:], "--mock-data"]).model
    clip = CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=16
    )
    check_vision_config(clip, model, Path("clip-vit-base-patch16"))
    qwen = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    )
    check_language_config(qwen, model, Path("Qwen2.5-0.5B-Instruct"), stage=FINETUNE)
