"""Mixture files: what they say, and that every mistake is an error with its line.

Planted once to see it fail: percentages rounded down, the environment before the file's variables, unknown keys let
through, line numbers from 0.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from megatron_haplovl.config.cli import parse_args
from megatron_haplovl.config.mixture import Mixture, TileRule, parse_sampling, parse_split
from megatron_haplovl.config.mixture_file import read_mixture

ENVIRONMENT = {"IMAGES": "/env/images", "DATA": "/env/data"}
WHOLE = """
variables: {ROOT: /root, DATA: "${ROOT}/data"}
split: 990,10
train:
  - name: instructions
    path: ${DATA}/instructions
    input: [a.json, "b-*.parquet"]
    image_folder: ${IMAGES}
    template: vicuna_v1
    epochs: 2
    sampling: first:10%
    cap: 1000
    max_tiles: 2
    image_token_budget: 64
    repairs: llava
    num_frames: 4
  - path: ${DATA}/text
aux:
  - {path: "${DATA}/captions", weight: 0.25}
  - {input: "raw/more.jsonl", weight: 3}
"""


def read(text: str, folder: Path, *given: str) -> Mixture:
    (folder / "mix.yaml").write_text(text, encoding="utf-8")
    return read_mixture(str(folder / "mix.yaml"), given, ENVIRONMENT)


def test_everything_that_a_file_can_say(tmp_path: Path) -> None:
    mixture = read(WHOLE, tmp_path)
    first, second = mixture.train
    assert first.where.endswith("mix.yaml, line 5") and second.name == "text"
    assert (first.name, first.input, first.template) == ("instructions", ("a.json", "b-*.parquet"), "vicuna_v1")
    assert (first.weight, first.epochs, first.cap, first.tiles) == (None, 2.0, 1000, TileRule(2, 64))
    assert (first.repairs, first.num_frames) == ("llava", 4)
    assert mixture.split == parse_split("990,10") and first.sampling == parse_sampling("first:10%")
    assert mixture.prefix(first) == "/root/data/instructions"
    assert first.image_folder is not None and mixture.fill(first.image_folder, first) == "/env/images"
    assert [(source.name, source.weight) for source in mixture.aux] == [("captions", 0.25), ("more", 3.0)]
    assert mixture.valid == ()


def test_variables_of_the_command_line_win_over_the_file_and_the_file_over_the_environment(tmp_path: Path) -> None:
    text = "variables: {DATA: /file}\ntrain: [{path: '${DATA}/${IMAGES}/x'}]\n"
    for given, expected in (((), "/file//env/images/x"), (("DATA=/flag", "IMAGES=i=j"), "/flag/i=j/x")):
        mixture = read(text, tmp_path, *given)
        assert mixture.prefix(mixture.train[0]) == expected


def test_a_variable_that_is_not_set_is_named_where_it_is_needed(tmp_path: Path) -> None:
    mixture = read("train:\n  - {path: p, image_folder: '${NOWHERE}/x'}\n  - {input: a/b.json}\n", tmp_path)
    source, without_path = mixture.train
    assert mixture.prefix(source) == "p" and source.image_folder is not None
    with pytest.raises(ValueError, match=r"mix.yaml, line 2: \$\{NOWHERE\} in .* --data-var NOWHERE=VALUE"):
        mixture.fill(source.image_folder, source)
    with pytest.raises(ValueError, match=r"line 3: \$\{PREPROCESSED\} in '\$\{PREPROCESSED\}/b' is not set"):
        mixture.prefix(without_path)


def test_the_yaml_of_llava_onevision(tmp_path: Path) -> None:
    text = """
datasets:
  - json_path: /data/single/train.json
    sampling_strategy: "first:10%"
  - json_path: /data/multi/train.json
    sampling_strategy: all
  - json_path: /data/video.jsonl
"""
    mixture = read(text, tmp_path, "PREPROCESSED=out")
    assert [mixture.prefix(source) for source in mixture.train] == [
        "out/single/train",
        "out/multi/train",
        "out/data/video",
    ]
    assert [source.sampling.kind for source in mixture.train] == ["first", "all", "all"]
    assert [source.input for source in mixture.train][2] == ("/data/video.jsonl",)
    assert all(source.weight is None and source.epochs is None for source in mixture.train)


@pytest.mark.parametrize(
    ("text", "total", "number"),
    [("all", 7, 7), ("first:10%", 11, 2), ("end:0.5%", 1000, 5), ("random:3", 7, 3), ("random:9", 7, 7)],
)
def test_samplings(text: str, total: int, number: int) -> None:
    assert parse_sampling(text).number(total) == number


@pytest.mark.parametrize("text", ["some", "first", "first:", "first:0", "first:101%", "random:1.5", "end:-1", "all:3"])
def test_other_samplings_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"'{text}'"):
        parse_sampling(text)


def test_splits() -> None:
    split = parse_split("969, 30,1")
    assert (split.train, split.valid, split.test) == (Fraction(969, 1000), Fraction(30, 1000), Fraction(1, 1000))
    assert parse_split("990,10").test == 0
    for text in ("990", "1,2,3,4", "a,b", "0,10", "990,0", "-1,2"):
        with pytest.raises(ValueError, match=f"the split '{text}'"):
            parse_split(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  - path: a\n    wieght: 1\n", "line 3: unknown key wieght; did you mean weight"),
        ("trian: []\n", "line 1: unknown key trian; did you mean train"),
        ("datasets:\n  - {json_path: a, weight: 1}\n", "line 2: unknown key weight"),
        ("datasets: [{json_path: a}]\ntrain: [{path: a}]\n", "line 2: unknown key train"),
        ("train:\n  - path: a\n    path: b\n", "line 3: path is given twice"),
        ("train: {path: a}\n", "line 1: a section is a list of sources"),
        ("train: []\n", "line 1: a section is a list of sources"),
        ("aux: [{path: a}]\n", "no source to train on"),
        ("", "line 1: nothing is not a mapping"),
        ("train:\n", "line 1: a section is a list of sources"),
        ("- a\n", "line 1: a list is not a mapping"),
        ("train:\n  - a\n", "line 2: 'a' is not a mapping"),
        ("train:\n  - {name: a}\n", "line 2: a source needs path"),
        ("train:\n  - {input: '*.json'}\n", r"line 2: '\*.json' gives the source no name"),
        ("train:\n  - {weight: 1}\n", "line 2: a source needs path"),
        ("train:\n  - {path: a, weight: 0}\n", "line 2: 0 is not a number above 0"),
        ("train:\n  - {path: a, weight: true}\n", "line 2: True is not a number above 0"),
        ("train:\n  - {path: a, cap: 1.5}\n", "line 2: 1.5 is not a whole number above 0"),
        ("train:\n  - {path: a, input: [b, 3]}\n", "line 2: 3 is not a string"),
        ("train:\n  - {path: a, sampling: 'first:200%'}\n", "line 2: 'first:200%' must take"),
        ("train:\n  - {path: a, weight: 1, epochs: 1}\n", "line 2: weight and epochs both say"),
        ("train:\n  - {path: a, weight: 1}\n  - {path: b}\n", "line 3: b has no weight and others"),
        ("train:\n  - {path: a, name: x}\n  - {path: b, name: x}\n", "two sources of one section are named x"),
        ("train: [{path: a}]\nvalid: [{path: b, weight: 1}]\n", "line 2: b is read once in a validation"),
        ("split: 9,1\ntrain: [{path: a}]\nvalid: [{path: b}]\n", "valid and split both say"),
        ("split: 9\ntrain: [{path: a}]\n", "line 1: 9 is not a string"),
        ("split: 9,x\ntrain: [{path: a}]\n", "line 1: the split '9,x'"),
        ("variables: {A: '${B}'}\ntrain: [{path: a}]\n", r"\$\{B\} in '\$\{B\}' is not set"),
        ("train: &x\n  - *x\n", "line 1: a value that holds itself"),
        ("train: [{path: !!python/name:os.system a}]\n", "not valid YAML"),
        ("train: [", "not valid YAML"),
    ],
)
def test_mistakes_are_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read(text, tmp_path)


def test_a_file_that_is_not_there_and_words_that_are_no_variables(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent.yaml: cannot be read"):
        read_mixture(str(tmp_path / "absent.yaml"), (), {})
    for given, message in (
        (("A",), "--data-var 'A' is not"),
        (("1=2",), "'1=2' is not"),
        (("A=1", "A=2"), "A is given"),
    ):
        with pytest.raises(ValueError, match=message):
            read("train: [{path: a}]\n", tmp_path, *given)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data-config m.yaml --data-path a", "--data-config m.yaml names all sources; leave out --data-path"),
        ("--data-config m.yaml --valid-data-path a", "--data-config m.yaml names all sources"),
        ("--data-config m.yaml --mock-data", "--mock-data reads no files; leave out --data-config"),
        ("--mock-data --split 9,1", "--mock-data reads no files; leave out --data-config and --split"),
        ("--data-path a --data-var A=1", "--data-var is for the paths of --data-config"),
        ("--data-path a --split 9", "the split '9' is not"),
        ("--data-path a --split 9,1 --valid-data-path b", "--split and --valid-data-path both say"),
        ("--data-path a --eval-interval 5", "--eval-interval needs --valid-data-path, --split or --data-config"),
        ("--seed 1", "nothing to train on: give --data-path PREFIX"),
    ],
)
def test_flags_that_contradict_each_other(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args("finetune", argv=["--model", "haplovl-debug", *words.split()])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", ["--data-config m.yaml --split 9,1 --eval-interval 5", "--data-path a --split 9,1"])
def test_flags_that_go_together(words: str) -> None:
    assert parse_args("finetune", argv=["--model", "haplovl-debug", *words.split()]).data.split == "9,1"
