"""haplovl-convert, -generate and -evaluate, from a training checkpoint to a table of accuracies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_haplovl.checkpoint.weight_files import WeightReader
from megatron_haplovl.commands import convert, evaluate, generate, preprocess, preprocess_arguments
from megatron_haplovl.config.schema import Config, DataConfig
from megatron_haplovl.data.chat_template import load_chat_template
from megatron_haplovl.data.tokenizer import load_tokenizer
from megatron_haplovl.evaluation import answering
from megatron_haplovl.evaluation.answering import load_answerer
from tests.fixtures.tiny_haplo import (
    noise_image,
    random_haplovl,
    save_training_checkpoint,
    tiny_model,
    train_tokenizer,
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a training checkpoint, a tokenizer, images, and the exported model."""
    folder = tmp_path_factory.mktemp("work")
    config = Config(model=tiny_model(), data=DataConfig(seq_length=96))
    save_training_checkpoint(random_haplovl(config.model), config, folder / "training")
    train_tokenizer(folder)
    for name, size in (("one.png", (8, 8)), ("wide.png", (8, 30))):
        noise_image(*size).save(folder / name)
    convert.main(_export_arguments(folder))
    return folder


def _export_arguments(folder: Path, *more: str) -> list[str]:
    return [
        *("export", "--load", str(folder / "training"), "--save", str(folder / "haplo")),
        *("--tokenizer-model", str(folder / "tokenizer.model"), "--chat-template", "vicuna_v1", *more),
    ]


def test_export_and_verify(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert.main(_export_arguments(work, "--verify"))
    report = capsys.readouterr().out.splitlines()
    reader = WeightReader(work / "haplo")
    parameters = sum(reader.get(name).numel() for name in reader.names())
    assert f"{parameters:,} parameters as torch.float32" in report[0]
    assert float(report[1].split(": ")[1].split()[0]) < 5e-5


def test_export_of_nothing(work: Path) -> None:
    arguments = _export_arguments(work)
    arguments[2] = str(work / "missing")
    with pytest.raises(SystemExit, match="error: .*missing: no such checkpoint folder"):
        convert.main(arguments)


def test_generate(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(work / "haplo"), "--prompt", "what color", "--max-new-tokens", "5", "--device", "cpu"]
    images = ["--image", str(work / "one.png"), str(work / "wide.png")]
    generate.main([*arguments, *images])
    answer = capsys.readouterr().out
    (expected,) = load_answerer(work / "haplo", "cpu").answer(
        ["<image>\n<image>\nwhat color"], [[work / "one.png", work / "wide.png"]], max_new_tokens=5
    )
    assert answer == expected + "\n"
    generate.main([*arguments, *images, "--temperature", "0.7", "--seed", "1"])
    sampled = capsys.readouterr().out
    generate.main([*arguments, *images, "--temperature", "0.7", "--seed", "1"])
    assert capsys.readouterr().out == sampled


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--image", "missing.png"], r"missing\.png"),
        (["--image", "training/latest"], "latest: not a readable image"),
        (["--model", "training/global_step7"], "model_type is None, not 'haplo'"),
        (["--temperature", "-1"], "--temperature at least 0"),
        (["--prompt", "<image> what"], "1 image marks, but 0 images"),
    ],
)
def test_generate_errors(work: Path, monkeypatch: pytest.MonkeyPatch, changes: list[str], message: str) -> None:
    monkeypatch.chdir(work)
    with pytest.raises(SystemExit, match=message):
        generate.main(["--model", "haplo", "--prompt", "what", *changes])


def test_a_template_that_loops_or_takes_all_memory_is_a_sentence(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a program that came with the model's folder."""
    monkeypatch.setattr(answering, "RENDER_SECONDS", 1)
    answerer = load_answerer(work / "haplo", "cpu")
    counting = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    growing = "{% set ns = namespace(x='xxxxxxxx') %}{% for a in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
    for template, said in ((counting, "has not written the question in 1 s"), (growing, "takes more than 1024 MiB")):
        answerer.processor.chat_template = template
        with pytest.raises(ValueError, match=said):
            answerer.answer(["what color"], [[]], max_new_tokens=2)


def test_evaluate(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answerer = load_answerer(work / "haplo", "cpu")
    prompts = ["what color", "what circle", "two", "left", "what large red"]
    images = [["one.png"], ["wide.png", "one.png"], [], ["wide.png"], ["one.png"]]
    # One by one and without padding, so that a batch is compared with the answer of each row alone.
    answers = [
        answerer.answer([prompt], [[work / name for name in names]], max_new_tokens=6)[0]
        for prompt, names in zip(prompts, images, strict=True)
    ]
    assert all(answers)
    assert len(set(answers)) > 1
    types = ["a", "a", "b", "b", "b"]
    truth = [answers[0], "no such answer", *answers[2:]]
    questions = [
        {"question_id": i, "text": prompts[i], "image": images[i], "answer": truth[i], "type": types[i]}
        for i in range(5)
    ]
    path = work / "questions.json"
    path.write_text(json.dumps(questions))
    arguments = [
        *("--model", str(work / "haplo"), "--question-file", str(path), "--image-folder", str(work)),
        *("--answers-file", str(work / "out" / "answers.jsonl"), "--json", str(work / "out" / "summary.json")),
        *("--max-new-tokens", "6", "--device", "cpu"),
    ]
    evaluate.main([*arguments, "--batch-size", "3"])
    printed = capsys.readouterr()
    assert "answered 5/5" in printed.err
    assert printed.out.splitlines()[1].split()[:3] == ["a", "2", "50.0%"]
    rows = [json.loads(line) for line in (work / "out" / "answers.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == answers
    assert [row["correct"] for row in rows] == [True, False, True, True, True]
    summary = json.loads((work / "out" / "summary.json").read_text())
    assert summary["accuracy"] == 0.8
    assert summary["per_type"]["b"]["accuracy"] == 1.0
    evaluate.main([*arguments, "--limit", "2"])
    assert json.loads((work / "out" / "summary.json").read_text())["count"] == 2


def test_evaluate_errors(work: Path) -> None:
    path = work / "bad.jsonl"
    path.write_text(json.dumps({"text": "what", "image": "missing.png", "answer": "red"}))
    arguments = ["--model", str(work / "haplo"), "--question-file", str(path), "--answers-file", str(work / "a.jsonl")]
    with pytest.raises(SystemExit, match=r"line 1: .*missing\.png"):
        evaluate.main([*arguments, "--image-folder", str(work)])
    with pytest.raises(SystemExit, match="--batch-size must be at least 1"):
        evaluate.main([*arguments, "--batch-size", "0"])


def test_tokenizer_and_template_come_from_the_training_data(work: Path, tmp_path: Path) -> None:
    record = {"conversations": [{"from": "human", "value": "what color"}, {"from": "gpt", "value": "red"}]}
    (tmp_path / "records.json").write_text(json.dumps([record]))
    tokenizer = str(work / "tokenizer.model")
    prefixes = {name: str(tmp_path / name) for name in ("vicuna_v1", "plain")}
    for template, prefix in prefixes.items():
        arguments = [
            *("--input", str(tmp_path / "records.json"), "--output-prefix", prefix, "--workers", "1"),
            *("--tokenizer-model", tokenizer, "--chat-template", template),
        ]
        assert preprocess.preprocess(preprocess_arguments.build_parser().parse_args(arguments)) == 0

    def export(name: str, tokenizer_model: str | None, *data_path: str) -> Path:
        data = DataConfig(seq_length=96, tokenizer_model=tokenizer_model, data_path=data_path)
        config = Config(model=tiny_model(), data=data)
        save_training_checkpoint(random_haplovl(config.model), config, tmp_path / name)
        arguments = ["export", "--load", str(tmp_path / name), "--save", str(tmp_path / name / "haplo")]
        convert.main(arguments)
        return tmp_path / name / "haplo"

    folder = export("good", tokenizer, prefixes["vicuna_v1"])
    assert (folder / "chat_template.jinja").read_text() == load_chat_template("vicuna_v1").source
    assert load_tokenizer(folder).fingerprint == load_tokenizer(tokenizer).fingerprint

    with pytest.raises(SystemExit, match="--tokenizer-model PATH"):
        export("no tokenizer", None, prefixes["vicuna_v1"])
    with pytest.raises(SystemExit, match="no chat templates; give --chat-template"):
        export("mock data", tokenizer)
    with pytest.raises(SystemExit, match=r"\['plain', 'vicuna_v1'\] chat templates"):
        export("two templates", tokenizer, "1", prefixes["vicuna_v1"], "1", prefixes["plain"])
    other = tmp_path / "other"
    load_tokenizer(tokenizer).hf.save_pretrained(other)
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<s>"}))
    with pytest.raises(SystemExit, match="preprocessed with another tokenizer"):
        export("other tokenizer", str(other), prefixes["vicuna_v1"])
