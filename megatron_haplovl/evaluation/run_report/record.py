"""All that a run has left behind and that a report shows."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_haplovl.checkpoint.folders import complete_checkpoints, step_of
from megatron_haplovl.config.cli import build_config
from megatron_haplovl.config.files import read_config, read_json
from megatron_haplovl.config.presets import MODELS
from megatron_haplovl.config.schema import Config
from megatron_haplovl.config.settings import iterate_settings
from megatron_haplovl.evaluation.answers_file import ANSWERS_FILE
from megatron_haplovl.evaluation.run_report.metrics import Metrics, read_metrics

METRICS_FILE = "metrics.jsonl"
"""Name of the metrics in the --save folder, where launch scripts put them."""
_LAST_WORDS = "last_words.json"


@dataclass
class RunRecord:
    """One run."""

    name: str
    folder: Path
    metrics: Metrics
    answers: list[dict[str, Any]] = field(default_factory=list)
    """Lines of the answers' file, the later one where a step was done again."""
    last_words: dict[str, Any] | None = None
    checkpoints: list[int] = field(default_factory=list)
    """Steps that were saved and are still there."""
    config: Config | None = None
    debug_files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is missing or cannot be read, in sentences."""


def read_run(folder: Path, metrics_file: Path | None = None) -> RunRecord:
    """Read a run's folder. What is not there or broken is in the notes.

    Args:
        folder: given as --save.
        metrics_file: where the metrics are, if they are not in the folder.

    Raises:
        ValueError: there is no such folder, or nothing of a run in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give the --save folder of a run")
    path = folder / METRICS_FILE if metrics_file is None else metrics_file
    notes: list[str] = []
    if path.is_file() or metrics_file is not None:
        metrics = read_metrics(path)
        notes += metrics.notes
    else:
        metrics = Metrics(path)
        notes.append(f"{path} is not there; give --metrics FILE if the run was started with --metrics-file FILE.")
    run = RunRecord(folder.name or str(folder), folder, metrics, notes=notes)
    run.answers = _answers(folder / ANSWERS_FILE, notes)
    run.last_words = _last_words(folder / _LAST_WORDS, notes)
    saved = complete_checkpoints(folder)
    run.checkpoints = sorted(step_of(path) for path in saved)
    if saved:
        run.config = _config(saved[0], notes)
    else:
        notes.append(f"{folder} has no checkpoint, so the settings are not known.")
    if (folder / "debug").is_dir():
        run.debug_files = sorted(str(p.relative_to(folder)) for p in (folder / "debug").rglob("*") if p.is_file())
    if not (run.metrics.lines or run.answers or run.last_words or run.checkpoints):
        raise ValueError(
            f"{folder} holds nothing of a run: no {METRICS_FILE}, no {ANSWERS_FILE}, no {_LAST_WORDS} and no "
            "checkpoint; give the --save folder of a run"
        )
    return run


def _answers(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    found: dict[tuple[Any, Any], dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    broken = repeated = 0
    for line in lines:
        try:
            answer = json.loads(line)
            key = (int(answer["step"]), str(answer["question_id"]))
            answer = {**answer, "question": str(answer["question"]), "answer": str(answer["answer"])}
        except (ValueError, TypeError, KeyError):
            broken += 1
            continue
        repeated += key in found
        found[key] = answer
    if broken:
        notes.append(f"{path}: {broken} of {len(lines)} lines are broken or half and are left out.")
    if repeated:
        notes.append(f"{path}: {repeated} answers were given again at the same step; the later ones are shown.")
    return [found[key] for key in sorted(found, key=lambda key: key[0])]


def _last_words(path: Path, notes: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return read_json(path)
    except ValueError as error:
        notes.append(f"{error}; the last words are left out.")
        return None


def _config(checkpoint: Path, notes: list[str]) -> Config | None:
    try:
        return read_config(checkpoint)
    except ValueError as error:
        notes.append(f"{error}; the settings are left out.")
        return None


def unusual_settings(config: Config) -> tuple[str, list[str]]:
    """The preset that is nearest to a run's model, and the settings, as flags, that differ from it."""
    presets = {name: build_config(config.stage.name, name, {}) for name in MODELS}
    changed = {name: _changes(preset, config) for name, preset in presets.items()}
    name = min(changed, key=lambda name: sum(path.startswith("model.") for path in changed[name]))
    return name, list(changed[name].values())


def differing_settings(configs: list[Config]) -> list[tuple[str, list[str]]]:
    """Flags in which runs differ, with the value of each."""
    rows = []
    for s in iterate_settings(Config):
        values = [s.value_in(config) for config in configs]
        if any(value != values[0] for value in values):
            rows.append((s.flag, [_shown(value) for value in values]))
    return rows


def _changes(base: Config, config: Config) -> dict[str, str]:
    return {
        s.dest: " ".join(s.words(s.value_in(config)))
        for s in iterate_settings(Config)
        if s.value_in(config) != s.value_in(base)
    }


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else "not given" if value is None else str(value)
