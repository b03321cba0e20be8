"""The recipes start what they are meant to: their dry runs, read by the very parser of the trainings."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from examples.common.phases import Phase
from examples.common.road import road
from examples.common.scheduler import key_of
from examples.own_data.recipe import build_parser, own_data
from megatron_haplovl.config.cli import parse_args
from megatron_haplovl.config.schema import Config

REPOSITORY = Path(__file__).parents[3]


@dataclass(frozen=True)
class Command:
    """A command of a dry run, as a shell would read it."""

    line: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line)

    def flag(self, name: str) -> list[str]:
        """The words behind a flag that is there once."""
        (start,) = (i for i, word in enumerate(self.words) if word == name)
        rest = self.words[start + 1 :]
        return rest[: next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))]

    def config(self) -> Config:
        """What the training script makes of it."""
        (script,) = (i for i, word in enumerate(self.words) if word.endswith("_haplovl.py"))
        return parse_args(self.words[script].removesuffix("_haplovl.py"), argv=self.words[script + 1 :])


def recipe(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"examples.{name}.recipe", *flags, "--dry-run"]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def commands_of(name: str, *flags: str) -> dict[str, Command]:
    """Title of a phase (or of the n-th ending) -> its command, in order."""
    result = recipe(name, *flags)
    assert result.returncode == 0, result.stderr
    found: dict[str, Command] = {}
    for title, line in re.findall(r"^# ([^,;\n]+).*\n(.+)$", result.stdout, re.MULTILINE):
        found[f"ending {len(found)}" if title == "at the end" else title] = Command(line)
    assert len(found) == len([line for line in result.stdout.splitlines() if not line.startswith("#")])
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder, which no dry run makes."""
    return tmp_path_factory.mktemp("recipe") / "run"


@pytest.fixture(scope="module")
def quickstart(run):
    commands = commands_of("quickstart", f"--run={run}", "--precision=fp32")
    assert not run.exists()
    return commands


RECORDS = ("instructions", "captions", "heldout_captions", "texts", "heldout_instructions")


def test_the_quickstarts_phases_in_order(quickstart):
    assert list(quickstart)[:-2] == [
        *("data", "tokenizer", "vision-teacher", "language-model", *(f"preprocess-{name}" for name in RECORDS)),
        *("stage1", "align", "full", "export", "plot", "evaluate"),
    ]


def test_the_quickstart_gives_each_teacher_a_core_and_its_numbers(quickstart, run):
    vision, language = quickstart["vision-teacher"], quickstart["language-model"]
    assert vision.words[0] == language.words[0] == "OMP_NUM_THREADS=1"
    assert [vision.flag(f"--{name}") for name in ("steps", "batch-size", "lr")] == [["400"], ["64"], ["1e-3"]]
    assert [language.flag(f"--{name}") for name in ("steps", "batch-size", "lr")] == [["600"], ["16"], ["1e-3"]]
    assert [vision.flag("--train"), vision.flag("--heldout"), vision.flag("--image-folder")] == [
        [f"{run}/data/captions.json"],
        [f"{run}/data/heldout_captions.json"],
        [f"{run}/data/images"],
    ]
    assert language.flag("--train") == [f"{run}/data/texts.json"]
    assert language.flag("--vocab-size") == quickstart["tokenizer"].flag("--vocab-size") == ["768"]
    assert not any("OMP_NUM_THREADS" in quickstart[name].line for name in ("tokenizer", "stage1", "full", "evaluate"))


@pytest.mark.parametrize(
    ("name", "template"), [(name, "plain" if "captions" in name else "examples/common/brief.jinja") for name in RECORDS]
)
def test_the_quickstart_preprocesses_for_the_model_that_it_trains(quickstart, run, name, template):
    command = quickstart[f"preprocess-{name}"]
    assert command.flag("--input") == [f"{run}/data/{name}.json"]
    assert command.flag("--output-prefix") == [f"{run}/preprocessed/{name}"]
    assert (command.flag("--chat-template"), command.flag("--workers")) == ([template], ["1"])
    for flag in ("--model", "--vocab-size", "--seq-length"):
        assert command.flag(flag) == quickstart["stage1"].flag(flag)


def test_the_quickstarts_trainings(quickstart, run):
    """Every number that the accuracies in README.md depend on."""
    stage1, align, full = (quickstart[name].config() for name in ("stage1", "align", "full"))
    for config in (stage1, align, full):
        schedule, log = config.schedule, config.logging
        assert (schedule.micro_batch_size, schedule.global_batch_size, schedule.lr_decay_style) == (4, 8, "cosine")
        assert (config.data.seq_length, config.data.num_workers, config.model.vocab_size) == (256, 0, 768)
        assert (config.model.init_std, config.parallel.zero_stage, config.optimizer.clip_grad) == (0.07, 1, 1.0)
        assert (log.log_interval, log.eval_iters, config.precision.bf16, config.run.device) == (
            10,
            10,
            False,
            "cpu",
        )
        assert config.data.tokenizer_model == f"{run}/tokenizer"
        assert (config.checkpoint.load, config.run.seed) == (None, 1234)
    assert [
        (c.recipe.recipe, c.schedule.train_iters, c.optimizer.lr, c.schedule.lr_warmup_iters, c.logging.eval_interval)
        for c in (stage1, align, full)
    ] == [("distill", 300, 1e-3, 20, 50), ("align", 150, 3e-3, 10, 50), ("full", 2200, 1.5e-3, 30, 250)]
    instructions, captions, texts = (f"{run}/preprocessed/{name}" for name in ("instructions", "captions", "texts"))
    assert stage1.data.data_path == ("2", instructions, "1", texts)
    assert stage1.data.aux_data_path == align.data.data_path == (captions,)
    assert full.data.data_path == ("3", instructions, "1", captions, "1", texts)
    assert [c.data.valid_data_path for c in (stage1, align, full)] == [
        (f"{run}/preprocessed/heldout_{name}",) for name in ("instructions", "captions", "instructions")
    ]
    assert (stage1.init.vision_teacher, stage1.init.language_model) == (
        f"{run}/teachers/vision",
        f"{run}/teachers/language",
    )
    assert (align.init.pretrained_checkpoint, align.init.language_model) == (
        f"{run}/stage1",
        f"{run}/teachers/language",
    )
    assert (full.init.pretrained_checkpoint, full.init.language_model) == (f"{run}/align", None)
    for name, script in (("stage1", "pretrain"), ("align", "finetune"), ("full", "finetune")):
        assert quickstart[name].words[:4] == ["deepspeed", "--num_gpus", "2", f"{script}_haplovl.py"]
        assert quickstart[name].config().checkpoint.save == f"{run}/{name}"
        assert quickstart[name].config().logging.metrics_file == f"{run}/metrics/{name}.jsonl"


def test_the_quickstarts_export_is_evaluated_and_asked(quickstart, run):
    export, evaluate, answer = quickstart["export"], quickstart["evaluate"], list(quickstart.values())[-1]
    assert (export.flag("--load"), export.flag("--save")) == ([f"{run}/full"], [f"{run}/haplovl-hf"])
    assert evaluate.flag("--model") == answer.flag("--model") == export.flag("--save")
    assert (evaluate.flag("--batch-size"), evaluate.flag("--max-new-tokens")) == (["64"], ["8"])
    assert evaluate.flag("--question-file") == [f"{run}/data/heldout_questions.jsonl"]
    assert (answer.flag("--prompt"), answer.flag("--device")) == (["How many shapes?"], ["cpu"])


def test_number_format_and_processes_are_the_users(run):
    bf16 = commands_of("quickstart", f"--run={run}", "--precision=bf16", "--num-processes=3")
    assert all(bf16[name].config().precision.bf16 for name in ("stage1", "align", "full"))
    assert all("--bf16" in bf16[name].words for name in ("vision-teacher", "language-model"))
    assert bf16["full"].words[:3] == ["deepspeed", "--num_gpus", "3"]
    # What has not been measured is not measured by a dry run.
    assert list(commands_of("quickstart", f"--run={run}"))[:2] == ["precision", "data"]
    assert not run.exists()


def test_what_has_been_measured_is_kept(tmp_path):
    (tmp_path / "precision").write_text("fp32\n")
    commands = commands_of("quickstart", f"--run={tmp_path}")
    assert "precision" not in commands
    assert not any("--bf16" in command.words for command in commands.values())


def test_nlvr(tmp_path, run):
    clone = tmp_path / "a clone"
    result = recipe("nlvr", str(clone))
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {clone}/dev/dev.json does not exist")
    for split in ("dev", "test"):
        (clone / split).mkdir(parents=True)
        (clone / split / f"{split}.json").write_text("")
    commands = commands_of("nlvr", str(clone), f"--run={run}", "--precision=fp32")
    configs = [commands[name].config() for name in ("stage1", "align", "full")]
    assert [(c.schedule.train_iters, c.optimizer.lr) for c in configs] == [(150, 1e-3), (80, 3e-3), (600, 1e-3)]
    for c in configs:
        assert (c.model.vision.max_tiles, c.model.vision.image_newline, c.data.seq_length) == (4, True, 512)
        assert (c.schedule.micro_batch_size, c.schedule.global_batch_size) == (2, 8)
    assert commands["preprocess-captions"].flag("--max-tiles") == ["4"]
    assert commands["preprocess-captions"].flag("--image-folder") == [str(clone)]
    assert commands["vision-teacher"].flag("--train") == [f"{run}/data/boxes.json"]
    assert configs[2].data.data_path == ("3", f"{run}/preprocessed/instructions", "1", f"{run}/preprocessed/captions")


@pytest.mark.parametrize("name", ["quickstart", "nlvr", "own_data"])
def test_the_runner_starts_without_torch(name):
    code = f"import sys, examples.{name}.recipe; sys.exit(bool({{'torch', 'numpy'}} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


@pytest.fixture
def own(tmp_path):
    """Flags that name files and folders which are there."""
    files = ("captions", "instructions", "heldout", "questions")
    folders = ("image-folder", "vision-teacher", "language-model")
    for name in files:
        (tmp_path / f"my {name}.json").write_text("[]")
    for name in folders:
        (tmp_path / name).mkdir()
    return [
        *(f"--{name}={tmp_path}/my {name}.json" for name in files),
        *(f"--{name}={tmp_path / name}" for name in folders),
        f"--run={tmp_path}/run",
    ]


@pytest.mark.parametrize(
    ("model", "template", "names"),
    [
        ("haplovl-7b", "vicuna_v1", ("stage1", "align", "instructions")),
        ("haplovl-8b", "llama3", ("stage1", "captions", "instructions")),
        ("haplovl-7b-pro", "chatml", ("stage1", "captions", "instructions")),
    ],
)
def test_own_data_trains_with_the_papers_recipe_on_eight_gpus(own, tmp_path, model, template, names):
    commands = commands_of("own_data", *own, f"--model={model}")
    assert list(commands)[:-2] == [
        *("preprocess-instructions", "preprocess-captions", "preprocess-heldout"),
        *(*names, "export", "plot", "evaluate"),
    ]
    assert not (tmp_path / "run").exists()
    configs = [commands[name].config() for name in names]
    for name, config in zip(names, configs, strict=True):
        script = "pretrain" if name == "stage1" else "finetune"
        assert commands[name].words[:4] == ["deepspeed", "--num_gpus", "8", f"{script}_haplovl.py"]
        paths = ["--data-path", "x", "--vision-teacher", "y", "--language-model", "z"]
        recipe = parse_args(script, argv=["--config", f"examples/recipes/{model}/{name}.yaml", *paths])
        assert (config.schedule.train_iters, config.optimizer) == (recipe.schedule.train_iters, recipe.optimizer)
        assert (config.model, config.recipe, config.data.packing) == (recipe.model, recipe.recipe, True)
        assert config.schedule.batch_unit == recipe.schedule.batch_unit == "samples"
        assert (config.parallel, config.schedule.micro_batch_size) == (
            recipe.parallel,
            recipe.schedule.micro_batch_size,
        )
        # An interrupted run goes on.
        assert config.checkpoint.load == config.checkpoint.save == f"{tmp_path}/run/{name}"
        assert config.checkpoint.save_interval is not None
        assert config.data.tokenizer_model == f"{tmp_path}/language-model"
        assert config.data.valid_data_path == (f"{tmp_path}/run/preprocessed/heldout",)
    stage1, captions, instructions = configs
    assert stage1.data.data_path == instructions.data.data_path == (f"{tmp_path}/run/preprocessed/instructions",)
    assert stage1.data.aux_data_path == captions.data.data_path == (f"{tmp_path}/run/preprocessed/captions",)
    assert stage1.init.vision_teacher == f"{tmp_path}/vision-teacher"
    assert captions.init.language_model == f"{tmp_path}/language-model"
    assert captions.init.pretrained_checkpoint == f"{tmp_path}/run/stage1"
    assert instructions.init.pretrained_checkpoint == f"{tmp_path}/run/{names[1]}"
    templates = [commands[f"preprocess-{name}"].flag("--chat-template") for name in ("instructions", "captions")]
    assert templates == [[template], ["plain"]]
    assert commands["export"].flag("--chat-template") == [template]


def test_own_datas_flags_win_over_its_files(own, tmp_path):
    settings = tmp_path / "my machine.yaml"
    settings.write_text("zero-stage: 3\nlr: 1e-5\n")
    flags = (
        "--launch=torchrun --nproc_per_node 4",
        f"--settings={settings}",
        "--stage1-args=--train-iters 2001 --lr 1e-6",
    )
    commands = commands_of("own_data", *own, *flags)
    assert commands["stage1"].words[:4] == ["torchrun", "--nproc_per_node", "4", "pretrain_haplovl.py"]
    stage1, full = commands["stage1"].config(), commands["instructions"].config()
    assert (stage1.schedule.train_iters, stage1.optimizer.lr, stage1.parallel.zero_stage) == (2001, 1e-6, 3)
    assert (full.schedule.train_iters, full.optimizer.lr, full.parallel.zero_stage) == (5198, 1e-5, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"captions": "nowhere.json"}, "--captions nowhere.json: no such file"),
        ({"vision-teacher": "nowhere"}, "--vision-teacher nowhere: no such folder"),
        ({"settings": "nowhere.yaml"}, "--settings nowhere.yaml: no such file"),
        ({"tokenizer-model": "nowhere"}, "--tokenizer-model nowhere: no such file or folder"),
        ({"vision-teacher": None}, "haplovl-7b needs --vision-teacher; only haplovl-debug makes its own"),
        ({"language-model": None, "model": "haplovl-debug"}, "without --language-model give --vocab-size N"),
    ],
)
def test_own_data_that_is_not_there_is_named(own, changes, message):
    kept = [flag for flag in own if flag.split("=")[0].removeprefix("--") not in changes]
    result = recipe("own_data", *kept, *(f"--{name}={value}" for name, value in changes.items() if value is not None))
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_the_small_model_makes_what_is_not_given(own, tmp_path):
    kept = [flag for flag in own if "vision-teacher" not in flag and "language-model" not in flag]
    commands = commands_of("own_data", *kept, "--model=haplovl-debug", "--vocab-size=512", "--device=cpu")
    assert list(commands)[:3] == ["tokenizer", "vision-teacher", "language-model"]
    assert commands["evaluate"].flag("--device") == ["cpu"]
    assert commands["tokenizer"].flag("--input") == [f"{tmp_path}/my captions.json", f"{tmp_path}/my instructions.json"]
    stage1 = commands["stage1"].config()
    assert (stage1.init.vision_teacher, stage1.model.vocab_size) == (f"{tmp_path}/run/teachers/vision", 512)
    assert stage1.data.tokenizer_model == commands["tokenizer"].flag("--output")[0]
    # A tokenizer of one's own goes into the teachers.
    given = commands_of("own_data", *kept, "--model=haplovl-debug", "--vocab-size=512", f"--tokenizer-model={tmp_path}")
    assert "tokenizer" not in given
    assert given["vision-teacher"].flag("--tokenizer-model") == [str(tmp_path)]


def own_phases(flags: list[str]) -> list[Phase]:
    return road(own_data(build_parser().parse_args(flags)))


def keys_of(phases: list[Phase]) -> dict[str, str]:
    keys: dict[str, str] = {}
    for phase in phases:
        keys[phase.name] = key_of(phase, keys)
    return keys


@pytest.mark.parametrize(
    ("name", "tokenizer", "first"),
    [
        ("questions", "made", {"evaluate"}),
        ("captions", "made", {"tokenizer"}),
        ("captions", "given", {"vision-teacher", "preprocess-captions"}),
        ("instructions", "given", {"language-model", "preprocess-instructions"}),
        ("heldout", "given", {"vision-teacher", "language-model", "preprocess-heldout"}),
        ("template", "given", {"preprocess-instructions", "preprocess-heldout"}),
    ],
)
def test_a_file_of_ones_own_that_changes_is_read_again(own, tmp_path, monkeypatch, name, tokenizer, first):
    """`first` are the phases that begin to differ."""
    monkeypatch.chdir(REPOSITORY)
    (tmp_path / "my template.json").write_text("")
    kept = [flag for flag in own if "vision-teacher" not in flag and "language-model" not in flag]
    flags = [*kept, "--model=haplovl-debug", "--vocab-size=512", f"--chat-template={tmp_path}/my template.json"]
    flags += [f"--tokenizer-model={tmp_path}"] if tokenizer == "given" else []
    phases = own_phases(flags)
    before = keys_of(phases)
    (tmp_path / f"my {name}.json").write_text("[{}]")
    after = keys_of(own_phases(flags))
    changed = {phase for phase in before if before[phase] != after[phase]}
    assert {p.name for p in phases if p.name in changed and not changed & {e.name for e in p.after}} == first
    (export,) = (phase for phase in phases if phase.name == "export")
    assert tmp_path / "my template.json" in export.inputs
