"""The road from LLaVA JSON to an evaluated model, as phases. A recipe says what is particular about it.

data, tokenizer, small teachers -> preprocessed files -> stage 1 -> captions -> instructions -> export -> evaluation.
What a user has already (data, tokenizer, CLIP, language model) is a path instead of a phase.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.common.phases import Phase
from examples.common.runner import Ending

BRIEF_TEMPLATE = "examples/common/brief.jinja"

Words = tuple[str | Path, ...]

# Read by the scripts that train teachers, beside the scripts themselves.
_TEACHER_INPUTS = (
    Path(BRIEF_TEMPLATE),
    Path("examples/common/samples.py"),
    Path("examples/common/teacher_loop.py"),
    Path("megatron_haplovl/config/presets.py"),
    Path("megatron_haplovl/conversion/hf_compatibility.py"),
)


@dataclass(frozen=True)
class Made:
    """What a script of examples/common makes for this run."""

    flags: Words
    """The script's, beside --output and the tokenizer."""
    inputs: tuple[Path, ...] = ()
    """Files that the flags name and no phase makes."""


@dataclass(frozen=True)
class Records:
    """LLaVA records, and the chat template that renders them."""

    name: str
    json: Path
    chat_template: str
    inputs: tuple[Path, ...] = ()
    """Files whose contents count; the records, where no phase makes them."""


@dataclass(frozen=True)
class Training:
    """One of the three trainings."""

    name: str
    title: str
    """Above its losses in the plot."""
    heldout: str
    """Name of the records that it is measured on."""
    settings: tuple[Path, ...]
    """Files with its numbers; a later one wins."""
    flags: Words
    """Its blend of data, and what wins over the files."""


@dataclass(frozen=True)
class Recipe:
    """What is particular about a road."""

    run: Path
    """Folder of the whole run."""
    data: tuple[Phase, ...]
    """Phases that make the records; none for one's own."""
    image_folder: Path
    records: tuple[Records, ...]
    """Everything that is trained or measured on."""
    preprocessing: Words
    """Flags of tools/preprocess_data.py: processes, and the model that samples must fit."""
    tokenizer: Path | Made
    vision_teacher: Path | Made
    language_model: Path | Made
    model: Words
    """Flags of all trainings that name the model and how it sees images, where no settings file does."""
    launch: Words
    """Words before a training script."""
    device: str
    stage1: Training
    captions: Training
    instructions: Training
    chat_template: str
    """What questions are rendered with after the export."""
    questions: Path
    """Made by a phase of `data`, if there is one."""
    evaluation: Words = ()
    """Flags of tools/evaluate.py."""
    resumes: bool = False
    """Whether an interrupted training goes on from its newest checkpoint; otherwise it starts over."""

    @property
    def exported(self) -> Path:
        """The model in the released format."""
        return self.run / "haplovl-hf"

    @property
    def plot(self) -> Path:
        """The curves of all losses."""
        return self.run / "losses.png"

    def prefix(self, name: str) -> Path:
        """Names of the preprocessed files of some records."""
        return preprocessed(self.run, name)

    def metrics(self, training: Training) -> Path:
        """Everything that a training logs."""
        return self.run / "metrics" / f"{training.name}.jsonl"

    @property
    def summary(self) -> Ending:
        """Gathers the results, and prints them."""
        command = ("python", "-m", "examples.common.summarize", "--run", self.run)
        return Ending((*command, "--hf-checkpoint", self.exported, "--plot", self.plot))

    @property
    def question(self) -> Ending:
        """Asks the first held-out question."""
        command = ("python", "-m", "examples.common.ask", "--model", self.exported, "--question-file", self.questions)
        return Ending((*command, "--image-folder", self.image_folder, "--device", self.device), lead="\n")


def preprocessed(run: Path, name: str) -> Path:
    """Prefix of preprocessed files."""
    return run / "preprocessed" / name


def road(recipe: Recipe) -> list[Phase]:
    """All phases, in an order in which they can be run."""
    tokenizer = _tokenizer(recipe)
    vision, language = _vision_teacher(recipe, tokenizer), _language_model(recipe, tokenizer)
    # Every training waits for all of them: beside a preprocessing it would not have the machine to itself.
    prepared = [_preprocess(recipe, records, tokenizer) for records in recipe.records]
    stage1 = _train(
        recipe,
        recipe.stage1,
        tokenizer,
        ("pretrain_haplovl.py", "--vision-teacher", vision.path, "--language-model", language.path),
        (*prepared, *vision.phases, *language.phases),
    )
    captions = _train(
        recipe,
        recipe.captions,
        tokenizer,
        (
            *("finetune_haplovl.py", "--pretrained-checkpoint", recipe.run / stage1.name),
            "--language-model",
            language.path,
        ),
        (*prepared, stage1),
    )
    instructions = _train(
        recipe,
        recipe.instructions,
        tokenizer,
        ("finetune_haplovl.py", "--pretrained-checkpoint", recipe.run / captions.name),
        (*prepared, captions),
    )
    export = _export(recipe, tokenizer, instructions)
    made = (*recipe.data, *tokenizer.phases, *vision.phases, *language.phases, *prepared)
    trained = (stage1, captions, instructions)
    return [*made, *trained, export, _plot(recipe, instructions), _evaluate(recipe, export)]


@dataclass(frozen=True)
class _Folder:
    """A folder that is there, or will be after a phase."""

    path: Path
    phases: tuple[Phase, ...] = ()


def _tokenizer(recipe: Recipe) -> _Folder:
    if isinstance(recipe.tokenizer, Path):
        return _Folder(recipe.tokenizer)
    output = recipe.run / "tokenizer"
    phase = Phase(
        "tokenizer",
        ("python", "-m", "examples.common.train_tokenizer", "--output", output, *recipe.tokenizer.flags),
        after=recipe.data,
        inputs=(Path("examples/common/train_tokenizer.py"), *recipe.tokenizer.inputs),
        outputs=(output,),
    )
    return _Folder(output, (phase,))


def _vision_teacher(recipe: Recipe, tokenizer: _Folder) -> _Folder:
    if isinstance(recipe.vision_teacher, Path):
        return _Folder(recipe.vision_teacher)
    return _teacher(recipe, "vision-teacher", "vision", "train_vision_teacher", recipe.vision_teacher, tokenizer)


def _language_model(recipe: Recipe, tokenizer: _Folder) -> _Folder:
    if isinstance(recipe.language_model, Path):
        return _Folder(recipe.language_model)
    made = Made(("--chat-template", BRIEF_TEMPLATE, *recipe.language_model.flags), recipe.language_model.inputs)
    return _teacher(recipe, "language-model", "language", "train_language_model", made, tokenizer)


def _teacher(recipe: Recipe, name: str, folder: str, script: str, made: Made, tokenizer: _Folder) -> _Folder:
    output = recipe.run / "teachers" / folder
    phase = Phase(
        name,
        (
            *("python", "-m", f"examples.common.{script}", "--tokenizer-model", tokenizer.path),
            *("--output", output, *made.flags),
        ),
        after=(*recipe.data, *tokenizer.phases),
        inputs=(Path(f"examples/common/{script}.py"), *_TEACHER_INPUTS, *made.inputs),
        outputs=(output,),
        # Both teachers are trained at once, on a core each.
        environment={"OMP_NUM_THREADS": "1"},
    )
    return _Folder(output, (phase,))


def _preprocess(recipe: Recipe, records: Records, tokenizer: _Folder) -> Phase:
    return Phase(
        f"preprocess-{records.name}",
        (
            *("python", "tools/preprocess_data.py", "--input", records.json, "--image-folder", recipe.image_folder),
            *("--output-prefix", recipe.prefix(records.name), "--tokenizer-model", tokenizer.path),
            *("--chat-template", records.chat_template, *recipe.preprocessing),
        ),
        after=(*recipe.data, *tokenizer.phases),
        inputs=(
            Path("megatron_haplovl/data"),
            Path("megatron_haplovl/commands/preprocess.py"),
            *_template_file(records.chat_template),
            *records.inputs,
        ),
    )


def _template_file(chat_template: str) -> tuple[Path, ...]:
    """The file, where a chat template is none of the package's."""
    path = Path(chat_template)
    return (path,) if path.is_file() else ()


def _train(recipe: Recipe, training: Training, tokenizer: _Folder, start: Words, after: Sequence[Phase]) -> Phase:
    """Launch `start`, the script and what it begins with."""
    script, *begin = start
    folder, metrics = recipe.run / training.name, recipe.metrics(training)
    return Phase(
        training.name,
        (
            *(*recipe.launch, script, *recipe.model, "--tokenizer-model", tokenizer.path, "--device", recipe.device),
            *("--save", folder, *(("--load", folder) if recipe.resumes else ()), "--metrics-file", metrics),
            *(*begin, "--valid-data-path", recipe.prefix(training.heldout), "--config", *training.settings),
            *training.flags,
        ),
        after=after,
        inputs=training.settings,
        outputs=(folder, metrics),
        resumes=recipe.resumes,
    )


def _export(recipe: Recipe, tokenizer: _Folder, trained: Phase) -> Phase:
    return Phase(
        "export",
        (
            *("python", "tools/convert_checkpoint.py", "export", "--load", recipe.run / trained.name),
            *("--save", recipe.exported, "--tokenizer-model", tokenizer.path, "--chat-template", recipe.chat_template),
        ),
        after=(trained,),
        inputs=(
            Path("megatron_haplovl/hf"),
            Path("megatron_haplovl/conversion"),
            Path("megatron_haplovl/commands/convert.py"),
            *_template_file(recipe.chat_template),
        ),
        outputs=(recipe.exported,),
    )


def _plot(recipe: Recipe, trained: Phase) -> Phase:
    trainings = (recipe.stage1, recipe.captions, recipe.instructions)
    stages = [word for training in trainings for word in ("--stage", f"{training.title}={recipe.metrics(training)}")]
    return Phase(
        "plot",
        ("python", "-m", "examples.common.plot_losses", "--output", recipe.plot, *stages),
        after=(trained,),
        inputs=(Path("examples/common/plot_losses.py"),),
        outputs=(recipe.plot,),
    )


def _evaluate(recipe: Recipe, export: Phase) -> Phase:
    summary = recipe.run / "evaluation.json"
    return Phase(
        "evaluate",
        (
            *("python", "tools/evaluate.py", "--model", recipe.exported, "--question-file", recipe.questions),
            *("--image-folder", recipe.image_folder, "--answers-file", recipe.run / "answers.jsonl", "--json", summary),
            *recipe.evaluation,
        ),
        after=(export,),
        inputs=(
            Path("megatron_haplovl/evaluation"),
            Path("megatron_haplovl/commands/evaluate.py"),
            *(() if recipe.data else (recipe.questions,)),
        ),
        outputs=(summary,),
    )
