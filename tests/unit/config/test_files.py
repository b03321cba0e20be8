"""Settings from files: what is accepted, what is refused, and what wins over what."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_haplovl.config.cli import build_config, parse_args, parse_command_line
from megatron_haplovl.config.files import read_settings
from megatron_haplovl.config.schema import Config
from megatron_haplovl.config.settings import iterate_settings
from megatron_haplovl.config.strict_yaml import load_yaml

DEBUG = "model: haplovl-debug\nmock-data: true\n"


@pytest.fixture
def written(tmp_path):
    """Writes a file; returns its path."""

    def write(content: str, name: str = "run.yaml") -> str:
        (tmp_path / name).write_text(content)
        return str(tmp_path / name)

    return write


def finetune(*words: str) -> Config:
    return parse_args("finetune", argv=[*words])


def test_the_model_and_everything_else_may_come_from_a_file(written):
    path = written(
        DEBUG + "global_batch_size: 16\nlr: 1e-4\npost-num-layers: 2\nweight-decay: 1\ndeepspeed_config: ds.json"
    )
    config = finetune("--config", path)
    flags = "--model haplovl-debug --mock-data --global-batch-size 16 --lr 1e-4 --post-num-layers 2 --weight-decay 1"
    assert config == finetune(*flags.split(), "--deepspeed_config", "ds.json")
    assert isinstance(config.optimizer.weight_decay, float)


def test_precedence_is_stage_then_preset_then_files_in_order_then_flags(written):
    first = written(DEBUG + "lr: 1.0e-3\nseq-length: 256\ntrain-iters: 7\n", "first.yaml")
    second = written('{"lr": 0.002, "train_iters": 8}', "second.json")
    assert finetune("--config", first).optimizer.adam_beta2 == 0.98
    config = finetune("--config", first, second, "--train-iters", "9")
    assert (config.data.seq_length, config.optimizer.lr, config.schedule.train_iters) == (256, 0.002, 9)
    # Given twice, as behind a launch script that has a file of its own.
    assert finetune("--config", first, "--train-iters", "9", "--config", second) == config
    assert (
        finetune("--config", first, "--model", "haplovl-7b").model == build_config("finetune", "haplovl-7b", {}).model
    )


def test_lists_and_null(written):
    path = written(
        DEBUG.replace("mock-data: true", "data-path: [0.3, a, 7, 007]\nvalid-data-path: b c\neval-interval: null")
    )
    config = finetune("--config", path)
    assert config.data.data_path == ("0.3", "a", "7", "007")
    assert config.data.valid_data_path == ("b c",)
    assert config.logging.eval_interval is None


def test_a_checkpoints_configuration_is_a_file_too(written):
    config = build_config(
        "finetune", "haplovl-7b", {("data", "data_path"): ["2", "a"], ("model", "pre", "num_layers"): 3}
    )
    path = written(json.dumps({**config.to_dict(), "iteration": 12}, indent=2), "config.json")
    assert finetune("--config", path) == config
    changed = finetune("--config", path, "--lr", "1e-3")
    assert changed == dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr=1e-3))
    # The same as YAML, in which a path may hold any character.
    assert read_settings(written(Path(path).read_text(), "config.yaml")).values == read_settings(path).values


def test_every_setting_survives_a_file(written):
    config = Config()
    flat = {s.flag[2:]: s.value_in(config) for s in iterate_settings(Config)}
    values = read_settings(written(json.dumps(flat), "all.json")).values
    assert {s.path: s.value_in(config) for s in iterate_settings(Config)} == values


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train-iter: 5", "unknown setting train-iter; did you mean train-iters?"),
        ("no-packing: true", "unknown setting no-packing; write packing: false"),
        ("--lr: 1e-4", "unknown setting --lr"),
        ("5: 1", "unknown setting 5"),
        ("train-iters: '5'", "train-iters: '5' is a string, not a whole number"),
        ("train-iters: 5.0", "train-iters: 5.0 is a number, not a whole number"),
        ("train-iters: true", "train-iters: True is a switch, not a whole number"),
        ("train-iters: 010", "train-iters: '010' is a string, not a whole number"),
        ("train-iters: null", "train-iters: None is nothing, not a whole number"),
        ("eval-interval: many", "eval-interval: 'many' is a string, not a whole number or null"),
        ("lr: '1e-4'", "lr: '1e-4' is a string, not a number"),
        ("lr: 1e999", "lr: inf is a number, not a number"),
        ("lr: true", "lr: True is a switch, not a number"),
        ("packing: no", "packing: 'no' is a string, not true or false"),
        ("packing: 0", "packing: 0 is a whole number, not true or false"),
        ("save: 2026", "save: 2026 is a whole number, not a string or null"),
        ("zero-stage: true", "zero-stage: True is a switch, not a whole number"),
        ("zero-stage: 4", "zero-stage: 4 is not one of 0, 1, 2, 3"),
        ("recipe: half", "recipe: 'half' is not one of distill, align, full"),
        ("model: haplovl-9b", "model: 'haplovl-9b' is not one of haplovl-7b,"),
        ("model: [haplovl-7b]", "model: ['haplovl-7b'] is not one of"),
        ("data-path: 3", "data-path: 3 is a whole number, not a list of strings"),
        ("data-path: [a, true]", "data-path: True is a switch, not a string"),
        ("lr: {peak: 1}", "lr: {'peak': 1} is a mapping, not a number"),
        ("lr: 1.0\nseed: 3\nlr: 2.0", "line 3: lr is given twice"),
        ("seq-length: 8\nseq_length: 8", "seq_length is given twice"),
        ("<<: {lr: 1.0}", "unknown setting <<"),
        ("- lr", "holds a list, not settings"),
        ("# lr: 1.0", "holds nothing, not settings"),
        ("lr: [1.0", "not valid YAML"),
        ("lr: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("model: {pre: {wings: 2}}", "unknown setting model.pre.wings"),
        ("model: {wings: {}}", "unknown setting model.wings"),
        ("model: {vocab_size: 1.5}", "model.vocab_size: 1.5 is a number, not a whole number"),
        ("model: {pre: {activation: relu}}", "model.pre.activation: 'relu' is not one of"),
        ("model: {vocab_size: 8, vocab_size: 8}", "line 1: vocab_size is given twice"),
        ("model_type: llama", "is that of a Hugging Face model"),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_the_setting(written, capsys, content, message):
    path = written(content)
    with pytest.raises(SystemExit) as exit_info:
        finetune("--config", path)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert f"{path}: " in error and message in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"lr": 1, "lr": 2}', "lr is given twice"),
        ('{"model": {"pre": {"num_layers": 1, "num_layers": 1}}}', "num_layers is given twice"),
        ('{"lr": NaN}', "lr: nan is a number"),
        ("lr: 1", "not valid JSON"),
    ],
)
def test_bad_json(written, content, message):
    with pytest.raises(ValueError, match=message):
        read_settings(written(content, "run.json"))


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.yaml: no such file"):
        read_settings("nowhere.yaml")
    with pytest.raises(ValueError, match="cannot be read"):
        read_settings(str(tmp_path))


def test_what_a_file_says_is_checked_together_with_the_flags(written, capsys):
    with pytest.raises(SystemExit):
        finetune("--config", written(DEBUG + "save-interval: 5"))
    assert "--save-interval needs --save" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        finetune("--config", written("mock-data: true"))
    assert "no model is named: give --model NAME, or a --config FILE" in capsys.readouterr().err


def test_a_recipe_is_for_one_stage(written, capsys):
    with pytest.raises(SystemExit):
        finetune("--config", written(DEBUG + "recipe: distill"))
    assert "finetune_haplovl.py trains --recipe align or full, not distill" in capsys.readouterr().err
    saved = written(json.dumps(build_config("pretrain", "haplovl-7b", {}).to_dict()), "config.json")
    with pytest.raises(SystemExit):
        finetune("--config", saved, "--data-path", "x")
    assert "finetune_haplovl.py trains --recipe align or full, not distill" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_args("pretrain", argv=["--config", written(DEBUG + "recipe: full")])
    assert "pretrain_haplovl.py trains --recipe distill, not full" in capsys.readouterr().err


def test_a_whole_model_stands_alone(written, capsys):
    saved = written(json.dumps(build_config("finetune", "haplovl-7b", {}).to_dict()), "config.json")
    recipe, preset = written("lr: 1.0"), written(DEBUG, "preset.yaml")
    for words, message in (
        (["--config", saved, "--model", "haplovl-8b"], f"{saved} holds a whole model, so the preset haplovl-8b"),
        (["--config", saved, preset], "so the preset haplovl-debug would change nothing"),
        (["--config", recipe, saved], f"nothing of {recipe} would be left; give it first"),
        (["--config", saved, saved], "give it first"),
    ):
        with pytest.raises(SystemExit):
            finetune(*words)
        assert message in capsys.readouterr().err


def test_the_log_names_what_differs_and_who_said_it(written):
    first = written(DEBUG + "lr: 1e-3\nglobal-batch-size: 128\nseq-length: 256\npacking: false\n", "first.yaml")
    second = written("seq-length: 300\nsave: my run\n", "second.yaml")
    command = parse_command_line("finetune", argv=["--config", first, second, "--train-iters", "9", "--lr", "3e-3"])
    assert command.differences.splitlines() == [
        "settings that differ from haplovl-debug:",
        f"  --mock-data --no-packing ({first})",
        f"  --seq-length 300 --save 'my run' ({second})",
        "  --lr 0.003 --train-iters 9 (command line)",
    ]
    saved = written(json.dumps(command.config.to_dict()), "config.json")
    again = parse_command_line("finetune", argv=["--config", saved, "--lr", "0.003", "--seed", "5"])
    assert again.differences == f"settings that differ from {saved}:\n  --seed 5 (command line)"
    assert parse_command_line("finetune", argv=["--config", saved]).differences.endswith("config.json:\n  none")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E+3", 1000.0), (".5", 0.5), ("-0.25", -0.25), ("12", 12), ("-3", -3), ("0", 0), ("~", None)]
    + [
        (word, word)
        for word in ("007", "0x1f", "1_000", "1:30", "yes", "off", "True", "2026-01-02", ".inf", "1e", "e5")
    ],
)
def test_yaml_scalars(text, value):
    loaded = load_yaml(text)
    assert loaded == value and type(loaded) is type(value)
