"""Sinks: each step once, whole lines only, and no error that ends a run."""

from __future__ import annotations

import logging
import resource
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_haplovl.config.cli import build_config
from megatron_haplovl.config.schema import Config
from megatron_haplovl.training.sinks import attempts
from megatron_haplovl.training.sinks.appended_file import AppendedFile
from megatron_haplovl.training.sinks.attempts import Attempts
from megatron_haplovl.training.sinks.json_lines import Cut, ThisStart, cut_back
from megatron_haplovl.training.sinks.sinks import Sinks, check_packages
from megatron_haplovl.training.sinks.weights_and_biases import ID_FILE
from tests.metrics_files import every_line, logged, starts


def settings(**overrides: Any) -> Config:
    wanted: dict[tuple[str, ...], Any] = {("data", "mock_data"): True}
    wanted |= {tuple(name.split("__")): str(value) for name, value in overrides.items()}
    return build_config("finetune", "haplovl-debug", wanted)


def steps(path: Path) -> list[int]:
    return [line["iteration"] for line in logged(path)]


def record(sinks: Sinks, *numbers: int) -> None:
    for step in numbers:
        sinks.record(step, {"loss": float(step)})
    sinks.close()


@pytest.fixture
def limited_files() -> Iterator[Any]:
    """Sets the largest size that this process may give to a file: a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt follows at once on one that has failed."""
    monkeypatch.setattr(attempts, "_PAUSE", 0.0)


# --- the metrics file ---


def lines(*numbers: int) -> bytes:
    return b"".join(b'{"iteration": %d, "loss": 1.0}\n' % step for step in numbers)


def start(step: int, time: float = 0.0) -> bytes:
    return b'{"iteration": %d, "time": %f, "start": %d}\n' % (step, time, step)


@pytest.mark.parametrize(
    ("before", "first_step", "after"),
    [
        (start(0) + lines(5, 10, 15), 10, start(0) + lines(5, 10)),
        (start(0) + lines(5, 10) + start(10) + lines(15, 20), 10, start(0) + lines(5, 10) + start(10)),
        (start(0) + lines(5, 10) + start(10) + start(10), 10, start(0) + lines(5, 10) + start(10) + start(10)),
        # The newest checkpoint is damaged: a start from it has been, and stays.
        (start(0) + lines(5, 10) + start(10) + lines(15), 5, start(0) + lines(5) + start(10)),
        (start(0) + start(0), 0, start(0) + start(0)),
        (start(0) + lines(5) + start(5)[:-3], 5, start(0) + lines(5)),
        (lines(5, 10, 15, 20), 10, lines(5, 10)),
        (lines(5, 10), 10, lines(5, 10)),
        (lines(0, 10, 10, 15), 10, lines(0, 10, 10)),
        (lines(5, 10) + b'{"iteration": 15, "lo', 15, lines(5, 10)),
        (lines(5, 10) + b'{"iteration": 15}', 15, lines(5, 10)),
        (lines(5) + b'{"itera\n' + lines(10), 10, lines(5, 10)),
        # As runs of older versions have left it: the steps of a restart behind those that it did again.
        (lines(5, 10, 15) + lines(10, 15, 20), 10, lines(5, 10, 10)),
        (lines(15, 20), 10, b""),
        (b"", 10, b""),
    ],
)
def test_the_file_is_cut_back_to_the_resumed_step(tmp_path: Path, before: bytes, first_step: int, after: bytes) -> None:
    path, other = tmp_path / "metrics.jsonl", tmp_path / "metrics.jsonl.plot"
    path.write_bytes(before)
    other.write_bytes(b"kept")
    cut_back(path, first_step)
    assert path.read_bytes() == after
    assert sorted(tmp_path.iterdir()) == [path, other] and other.read_bytes() == b"kept"


def test_a_run_that_begins_anew_sets_the_old_file_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for number in (1, 2):
        path.write_bytes(lines(number))
        cut_back(path, 0)
        assert not path.exists()
        assert (tmp_path / f"metrics.jsonl.{number}").read_bytes() == lines(number)


def test_every_start_has_a_line_that_stays(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    moments: list[float] = []

    def ending_before(since: float) -> str:
        moments.append(since)
        return f"fault {len(moments)}"

    for number, (first_step, *recorded) in enumerate([(0, 5, 10, 15), (10, 15, 20), (20,), (20, 25), (10, 15)]):
        sinks = Sinks(
            settings(logging__metrics_file=path),
            first_step,
            enabled=True,
            start=ThisStart(f"id {number}", ending_before),
        )
        record(sinks, *recorded)
    names = ("start", "iteration", "run id", "repeated steps", "set aside", "ending before")
    assert [tuple(line[name] for name in names) for line in starts(path)] == [
        (0, 0, "id 0", 0, None, None),
        (10, 10, "id 1", 5, None, "fault 1"),
        (20, 20, "id 2", 0, None, "fault 2"),
        (20, 20, "id 3", 0, None, "fault 3"),
        (10, 10, "id 4", 15, None, "fault 4"),
    ]
    # What was said before the last start is of an earlier one.
    assert moments == [line["time"] for line in starts(path)][:-1] and moments == sorted(moments)
    assert steps(path) == [5, 10, 15]


def test_a_start_from_nothing_names_the_file_that_it_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sinks = settings(logging__metrics_file=path)
    record(Sinks(sinks, 0, enabled=True))
    record(Sinks(sinks, 0, enabled=True), 1, 2)  # The start before has logged nothing: no file is set aside.
    assert sorted(tmp_path.iterdir()) == [path] and [line["set aside"] for line in starts(path)] == [None, None]
    record(Sinks(sinks, 0, enabled=True), 1)
    (line,) = starts(path)
    assert (line["set aside"], line["repeated steps"]) == ("metrics.jsonl.1", 0) and steps(path) == [1]
    assert steps(tmp_path / "metrics.jsonl.1") == [1, 2] and len(starts(tmp_path / "metrics.jsonl.1")) == 2


@pytest.mark.parametrize(
    ("before", "last_start"),
    [
        (start(0, 3.0) + lines(5) + start(5, 7.0), 7.0),
        (b'{"iteration": 5, "time": 4.5, "loss": 1.0}\n' + lines(10), 4.5),
        (b'{"iteration": 5, "time": 9.5, "loss": 1.0}\n' + start(5, 7.0), 7.0),
        (b"", None),
    ],
)
def test_when_the_start_before_began(tmp_path: Path, before: bytes, last_start: float | None) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(before)
    assert cut_back(tmp_path / "metrics.jsonl", 10) == Cut(last_start=last_start)


@pytest.mark.usefixtures("no_pause")
def test_the_line_of_a_start_waits_for_room(tmp_path: Path, limited_files: Any, caplog: Any) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines(5, 10, 15))
    limited_files(len(lines(5, 10)) + 5)
    sinks = Sinks(settings(logging__metrics_file=path), 10, enabled=True)
    sinks.record(15, {"loss": 1.0})
    limited_files(None)
    record(sinks, 20)
    assert [(line["iteration"], line.get("repeated steps")) for line in every_line(path)] == [
        *((5, None), (10, None), (10, 5), (15, None), (20, None))
    ]
    assert "too large; the run goes on without it" in caplog.text


@pytest.mark.parametrize("first_step", [0, 10])
def test_a_file_that_is_something_else_stays_as_it_is(tmp_path: Path, first_step: int, caplog: Any) -> None:
    path = tmp_path / "questions.json"
    path.write_text('[\n{"question": 1}\n]\n')
    record(Sinks(settings(logging__metrics_file=path), first_step, enabled=True), 11)
    assert path.read_text() == '[\n{"question": 1}\n]\n' and list(tmp_path.iterdir()) == [path]
    assert "line 1 is not a line of metrics" in caplog.text


def test_a_file_that_cannot_be_written_anew_stays_whole(tmp_path: Path, limited_files: Any) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines(5, 10, 15, 10))
    limited_files(20)
    with pytest.raises(OSError, match="too large"):
        cut_back(path, 10)
    limited_files(None)
    assert path.read_bytes() == lines(5, 10, 15, 10) and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("room", range(0, 70, 7))
def test_a_full_disk_leaves_whole_records_and_loses_none(tmp_path: Path, limited_files: Any, room: int) -> None:
    records = [b"%d" % number * 30 + b"\n" for number in range(4)]
    path = tmp_path / "file"
    file = AppendedFile(path)
    limited_files(room)
    for number in range(3):
        fits = min(number + 1, room // 31)
        try:
            file.append(records[number])
            assert fits == number + 1
        except OSError:
            assert fits <= number
        assert path.read_bytes() == b"".join(records[:fits])
    limited_files(None)
    file.append(records[3])
    file.close()
    assert path.read_bytes() == b"".join(records)


# --- errors ---


@pytest.mark.usefixtures("no_pause")
def test_an_error_is_said_once_and_the_return_too(tmp_path: Path, limited_files: Any, caplog: Any) -> None:
    path = tmp_path / "metrics.jsonl"
    sinks = Sinks(settings(logging__metrics_file=path), 0, enabled=True)
    sinks.record(1, {"loss": 1.0})
    limited_files(path.stat().st_size + 10)
    for step in (2, 3, 4):
        sinks.record(step, {"loss": 1.0})
        assert steps(path) == [1]
    limited_files(None)
    sinks.record(5, {"loss": 1.0})
    sinks.close()
    assert [message for message in caplog.messages if str(path) in message] == [
        f"metrics file {path}: OSError: [Errno 27] File too large; the run goes on without it",
        f"metrics file {path}: works again",
    ]
    assert steps(path) == [1, 2, 3, 4, 5]


@pytest.mark.usefixtures("no_pause")
@pytest.mark.parametrize("flag", ["metrics_file", "tensorboard_dir"])
def test_a_sink_that_cannot_be_opened_ends_nothing_and_is_opened_later(tmp_path: Path, flag: str, caplog: Any) -> None:
    (tmp_path / "in the way").write_text("a file")
    path = tmp_path / "in the way" / "sink"
    sinks = Sinks(settings(**{f"logging__{flag}": path}), 0, enabled=True)
    sinks.record(1, {"loss": 1.0})
    assert sum("the run goes on without it" in message for message in caplog.messages) == 1
    (tmp_path / "in the way").unlink()
    sinks.record(2, {"loss": 1.0})
    sinks.close()
    assert path.exists() and "works again" in caplog.messages[-1]


def test_a_slow_failure_is_not_repeated_at_once() -> None:
    now, calls = [0.0], []

    def fail() -> None:
        calls.append(now[0])
        now[0] += 2.0
        raise TimeoutError("no answer")

    attempt = Attempts("tracker", lambda: now[0])
    for _ in range(500):
        attempt(fail)
        now[0] += 1.0
    # 2 s of every 202 s.
    assert calls == [0.0, 202.0, 404.0]


def test_no_exception_of_a_tracker_ends_a_run(tmp_path: Path, wandb: Any, caplog: Any) -> None:
    wandb.broken = True
    sinks = Sinks(settings(logging__wandb_project="p", checkpoint__save=tmp_path), 0, enabled=True)
    record(sinks, 1, 2)
    assert caplog.messages == ["Weights & Biases: CommError: no network; the run goes on without it"]


def test_a_missing_package_is_refused_before_anything_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ValueError, match="--wandb-project needs the package wandb: pip install wandb"):
        check_packages(settings(logging__wandb_project="p").logging)
    with pytest.raises(ValueError, match="--tensorboard-dir needs the package tensorboard"):
        check_packages(settings(logging__tensorboard_dir="t").logging)


# --- each step once, in every sink ---


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    config = settings(logging__tensorboard_dir=tmp_path)
    record(Sinks(config, 0, enabled=True), 0, 5, 10, 15)
    record(Sinks(config, 10, enabled=True), 15, 20)
    record(Sinks(config, 20, enabled=True), 25)
    shown = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in shown] == [(step, float(step)) for step in (0, 5, 10, 15, 20, 25)]


def test_a_new_run_in_the_folder_hides_the_old_one(tmp_path: Path) -> None:
    config = settings(logging__tensorboard_dir=tmp_path)
    record(Sinks(config, 0, enabled=True), 0, 5, 10)
    record(Sinks(config, 0, enabled=True), 0, 5)
    assert [event.step for event in EventAccumulator(str(tmp_path)).Reload().Scalars("loss")] == [0, 5]


def test_texts_go_where_they_are_shown(tmp_path: Path, wandb: Any) -> None:
    events, metrics = tmp_path / "events", tmp_path / "metrics.jsonl"
    config = settings(logging__tensorboard_dir=events, logging__wandb_project="p", logging__metrics_file=metrics)
    sinks = Sinks(config, 0, enabled=True)
    sinks.record_texts(3, {"answer": "a cat"})
    sinks.close()
    shown = EventAccumulator(str(events)).Reload()
    assert [(e.step, e.tensor_proto.string_val) for e in shown.Tensors("answer/text_summary")] == [(3, [b"a cat"])]
    assert list(wandb.runs.values()) == [[(3, {"answer": "a cat"})]] and logged(metrics) == []


@pytest.mark.usefixtures("no_pause")
def test_tensorboard_goes_on_after_a_full_disk(tmp_path: Path, limited_files: Any) -> None:
    sinks = Sinks(settings(logging__tensorboard_dir=tmp_path), 0, enabled=True)
    sinks.record(1, {"loss": 1.0})
    (file,) = tmp_path.iterdir()
    limited_files(file.stat().st_size + 20)
    sinks.record(2, {"loss": 2.0})
    limited_files(None)
    sinks.record(3, {"loss": 3.0})
    sinks.close()
    assert [event.step for event in EventAccumulator(str(tmp_path)).Reload().Scalars("loss")] == [1, 2, 3]


class _FakeRun:
    def __init__(self, of: Any, run_id: str) -> None:
        self._of, self.id = of, run_id
        self._history = of.runs.setdefault(run_id, [])
        self.step = self._history[-1][0] + 1 if self._history else 0

    def log(self, values: dict[str, float], step: int) -> None:
        # wandb takes nothing for a step before the one it is at.
        assert step >= self.step, (step, self.step)
        self.step = step
        self._history.append((step, values))

    def finish(self) -> None:
        self._of.finished.append(self.id)


class CommError(Exception):
    pass


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in of wandb with what is used of it."""
    module: Any = types.ModuleType("wandb")
    module.runs, module.finished, module.broken = {}, [], False

    def init(*, project: str, id: str, resume: str, config: dict[str, Any], allow_val_change: bool) -> _FakeRun:
        assert (project, resume, allow_val_change) == ("p", "allow", True) and config["run"]["seed"] == 1234
        if module.broken:
            raise CommError("no network")
        return _FakeRun(module, id)

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_one_run_of_weights_and_biases_has_each_step_once(tmp_path: Path, wandb: Any) -> None:
    config = settings(logging__wandb_project="p", checkpoint__save=tmp_path / "run")
    first = Sinks(config, 0, enabled=True)
    for step in (0, 5, 10, 10, 15):  # A training and a validation line of one step.
        first.record(step, {"loss": 1.0})
    for start in (10, 10):
        record(Sinks(config, start, enabled=True), *range(start + 5, start + 15, 5))
    ((run_id, history),) = wandb.runs.items()
    assert [step for step, _ in history] == [0, 5, 10, 10, 15, 20]
    assert (tmp_path / "run" / ID_FILE).read_text().strip() == run_id


def test_without_a_folder_every_start_is_a_run(wandb: Any) -> None:
    for _ in range(2):
        record(Sinks(settings(logging__wandb_project="p"), 0, enabled=True), 1)
    assert Counter(len(history) for history in wandb.runs.values()) == {1: 2}


def test_a_full_disk_below_the_id_ends_nothing(tmp_path: Path, wandb: Any, limited_files: Any, caplog: Any) -> None:
    limited_files(0)
    record(Sinks(settings(logging__wandb_project="p", checkpoint__save=tmp_path), 0, enabled=True), 1)
    limited_files(None)  # Before pytest reports, whose output may be a file, too.
    assert "a restart will be another run for Weights & Biases" in caplog.text
    assert len(wandb.runs) == 1


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    record(Sinks(settings(logging__metrics_file=path, logging__tensorboard_dir=tmp_path), 0, enabled=False), 1)
    assert list(tmp_path.iterdir()) == []


# --- standard output ---

_PRINTS = """
import logging, sys
from megatron_haplovl.operation.streams import forgive_broken_streams
from megatron_haplovl.training.logging import configure_logging
forgive_broken_streams()
configure_logging(0)
log = logging.getLogger("megatron_haplovl.training.loop")
for number in range(50):
    log.info("x" * 1000)
    print("y" * 1000)
sys.stderr.write("the end\\n")
"""


@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.parametrize("where", ["closed pipe", "full disk", "limit", "closed"])
def test_broken_standard_output_ends_nothing(tmp_path: Path, where: str, buffered: str) -> None:
    redirection = {
        "closed pipe": "python - | true",
        "full disk": "python - > /dev/full",
        "limit": f"ulimit -f 8; python - > '{tmp_path}/out'",
        "closed": "python - >&-",
    }[where].replace("python -", f"'{sys.executable}' -c '{_PRINTS}'")
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {redirection}"],
        env={"PYTHONPATH": str(Path(__file__).parents[3]), "PYTHONUNBUFFERED": buffered},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # Closed from the start: Python itself has no standard output then, and records go to standard error.
    assert done.stderr.count("warning: standard output: ") == (0 if where == "closed" else 1), done.stderr[-2000:]
    assert "the end" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture(autouse=True)
def records(caplog: Any) -> Iterator[None]:
    """The package's records reach pytest, whatever a test before has set up."""
    package = logging.getLogger("megatron_haplovl")
    state = (package.handlers, package.level, package.propagate)
    package.handlers, package.propagate = [], True
    caplog.set_level(logging.WARNING)
    yield
    package.handlers, package.level, package.propagate = state
