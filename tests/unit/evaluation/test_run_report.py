"""The report of a run: what is read of damaged files, what is drawn, and what the page says."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_haplovl.commands.report_run import main
from megatron_haplovl.config.cli import build_config
from megatron_haplovl.evaluation.run_report.curves import smoothed, thinned
from megatron_haplovl.evaluation.run_report.metrics import Restart, Start, read_metrics
from megatron_haplovl.evaluation.run_report.panels import panels_of, step_seconds, table_columns
from megatron_haplovl.evaluation.run_report.record import differing_settings, read_run, unusual_settings
from tests.fixtures.tiny_haplo import noise_image

SCRIPT = "<script>alert(1)</script>"


def line(step: int, **values: Any) -> dict[str, Any]:
    return {"iteration": step, "time": 1000.0 + step, **values}


def write_lines(path: Path, *lines: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
    return path


def save_config(folder: Path, step: int, lr: float) -> None:
    changes: dict[tuple[str, ...], Any] = {
        ("optimizer", "lr"): lr,
        ("data", "mock_data"): True,
        ("schedule", "train_iters"): 50,
    }
    config = build_config("finetune", "haplovl-debug", changes)
    checkpoint = folder / f"global_step{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text(json.dumps({**config.to_dict(), "iteration": step}))
    (checkpoint / "manifest.json").write_text("{}")


def make_run(folder: Path, lr: float = 1e-3) -> Path:
    """A run of 40 steps with everything that a report shows, texts among it that a page must not take as HTML."""
    lines = [line(0, **{"valid lm loss": 5.0, "valid lm loss/a": 6.0})]
    for step in range(1, 41):
        columns = {"lm loss": 5 / step, "loss": 5 / step, "lm loss/a": 6 / step, "lm loss/b": 4 / step}
        times = {"elapsed time per iteration (ms)": 500.0, "loader wait (ms)": 50.0}
        others = {"learning rate": lr, "consumed samples": 8 * step, "peak memory (GiB)": 3.5, f"x{SCRIPT}": 1.0}
        lines.append(line(step, **columns, **times, **others))
    lines.append(line(40, **{"valid lm loss": 1.0, "valid lm loss/a": 2.0}))
    write_lines(folder / "metrics.jsonl", *lines)
    noise_image(30, 40).save(folder / "one.png")
    question = {"question_id": SCRIPT, "question": f"<image>{SCRIPT}?", "images": [str(folder / "one.png")]}
    answers = [{**question, "step": step, "answer": f"{SCRIPT} {step}", "reference": SCRIPT} for step in range(1, 30)]
    write_lines(folder / "samples.jsonl", *answers, "half", answers[-1])
    words = {"code": 1, "sentence": f"a loss is {SCRIPT}", "cause": "nan", "step": 40, "host": "n0", "time": 1.7e9}
    (folder / "last_words.json").write_text(json.dumps(words))
    (folder / "debug").mkdir()
    (folder / "debug" / "rank1.txt").write_text("a stack")
    for step in (20, 40):
        save_config(folder, step, lr)
    return folder


def test_repeated_steps_and_restarts(tmp_path: Path) -> None:
    train = [line(step, loss=float(step)) for step in (1, 2, 3, 4)]
    again = [line(step, loss=10.0 + step) for step in (3, 4, 5)]
    valid = [line(2, **{"valid loss": 7.0}), line(4, **{"valid loss": 8.0})]
    found = read_metrics(write_lines(tmp_path / "m", *train[:2], valid[0], *train[2:], valid[1], *again, valid[1]))
    column = found.column("loss")
    assert list(column.steps) == [1, 2, 3, 4, 5]
    assert list(column.values) == [1.0, 2.0, 13.0, 14.0, 15.0]
    assert list(found.column("valid loss").steps) == [2, 4]
    assert found.restarts == [Restart(4, 3)]
    assert found.notes == ["3 values are of steps that were done again after a restart; the later ones are shown."]


def start_line(step: int, **about: Any) -> dict[str, Any]:
    known = {"run id": "", "repeated steps": 0, "set aside": None, "ending before": None}
    return {**line(step), "start": step, **known, **{name.replace("_", " "): value for name, value in about.items()}}


def resumed_twice(path: Path) -> Path:
    """As the sink leaves it: each step once, and a line of each of the three starts."""
    lines: list[dict[str, Any]] = [start_line(0, run_id="a0"), *(line(step, loss=1.0 / step) for step in (1, 2))]
    lines += [start_line(2, run_id="b1", repeated_steps=3, ending_before=f"lost {SCRIPT}"), line(3, loss=0.2)]
    lines += [start_line(3, run_id="c2"), line(4, loss=0.1)]
    return write_lines(path, *lines)


def test_every_start_is_read_and_is_no_column(tmp_path: Path) -> None:
    found = read_metrics(resumed_twice(tmp_path / "m"))
    assert found.starts == [
        Start(0, 1000.0, "a0"),
        Start(2, 1002.0, "b1", repeated=3, ending_before=f"lost {SCRIPT}"),
        Start(3, 1003.0, "c2"),
    ]
    assert list(found.columns) == ["loss"] and list(found.column("loss").steps) == [1, 2, 3, 4]
    assert found.notes == [] and found.restarts == []
    damaged = {**start_line(5), "run id": 7, "repeated steps": "3", "set aside": [], "ending before": 1.0, "time": None}
    (start,) = read_metrics(write_lines(tmp_path / "damaged", damaged)).starts
    assert (start.step, start.run_id, start.repeated, start.aside, start.ending_before) == (5, "", 0, None, None)


def test_the_page_shows_every_start(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    resumed_twice(folder / "metrics.jsonl")
    main([str(folder)])
    text = (folder / "report.html").read_text()
    for words in (
        "<tr><td>starts</td><td>3; 3 logged steps were done again</td></tr>",
        "<li>start at step 0, 1970-01-01 00:16:40 UTC, run id a0</li>",
        "<li>start at step 2, 1970-01-01 00:16:42 UTC, run id b1; 3 logged steps were done again; "
        "the start before ended: lost &lt;script&gt;alert(1)&lt;/script&gt;</li>",
        "<li>start at step 3, 1970-01-01 00:16:43 UTC, run id c2; how the start before ended is not known</li>",
    ):
        assert words in text, words
    assert "restarts that repeated steps" not in text
    write_lines(folder / "metrics.jsonl", start_line(0, set_aside="metrics.jsonl.1", ending_before="a fault"))
    main([str(folder)])
    text = (folder / "report.html").read_text()
    assert "UTC; what was logged before is in metrics.jsonl.1; the start before ended: a fault</li>" in text
    write_lines(folder / "metrics.jsonl", *(line(step, loss=1.0) for step in (1, 2, 2, 3)))
    main([str(folder)])
    text = (folder / "report.html").read_text()
    assert "<tr><td>restarts that repeated steps</td><td>1</td></tr>" in text and "<td>starts</td>" not in text
    assert "<li>step 2 was logged again after step 2: the run was taken back</li>" in text


def test_damage_is_named(tmp_path: Path) -> None:
    huge = '{"iteration": 3, "loss": 1' + "0" * 400 + "}"
    broken = ['{"iteration": 1, "lo', "[]", "7", "", '{"loss": 1}', '{"iteration": "1"}', '{"iteration": true}', "\x00"]
    path = write_lines(tmp_path / "m", line(1, loss=1.0, text="x", flag=True), *broken, line(2, loss=math.nan), huge)
    with path.open("ab") as file:
        file.write(b'{"iteration": 4, "loss": \xff')
    found = read_metrics(path)
    assert list(found.column("loss").steps) == [1, 2, 3]
    assert found.column("loss").values[0] == 1.0 and all(math.isnan(value) for value in found.column("loss").values[1:])
    assert found.notes == [
        "9 of 12 lines are broken or half and are left out (line 2, 3, 4 and others).",
        "'flag' is no number in 1 lines; these are left out.",
        "'text' is no number in 1 lines; these are left out.",
        "'loss' is NaN or infinite 2 times; the curve has a gap there.",
    ]
    assert read_metrics(write_lines(tmp_path / "empty")).notes == [f"{tmp_path / 'empty'} is empty."]
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_metrics(tmp_path / "missing")


def test_the_average_is_exponential() -> None:
    values = [4.0, 0.0, math.nan, 2.0]
    # Weight 2 / (3 + 1): each value counts half of all that is before it.
    assert smoothed(values, 3).tolist() == [4.0, 2.0, 2.0, 2.0]
    assert smoothed([1.0, 5.0, 3.0], 1).tolist() == [1.0, 5.0, 3.0]
    assert np.isnan(smoothed([math.nan, math.nan], 3)).all()


def test_a_long_curve_keeps_its_extremes_and_gaps() -> None:
    values = np.sin(np.arange(1_000_000) / 1e4)
    values[345_678], values[777_777], values[900_000] = 50.0, -50.0, math.nan
    x, y = thinned(range(1_000_000), values.tolist(), 1000)
    assert len(x) <= 1002
    assert y[x == 345_678].tolist() == [50.0] and y[x == 777_777].tolist() == [-50.0]
    assert np.isnan(y[x == 900_000]).all() and (x == 900_000).any()
    assert (np.diff(x) > 0).all()
    short = thinned([1, 2], [3.0, 4.0])
    assert short[0].tolist() == [1.0, 2.0] and short[1].tolist() == [3.0, 4.0]


def test_every_column_is_shown(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run"))
    panels = panels_of([run], 4)
    names = {panel.title for panel in panels} | set(table_columns([run]))
    # "loss" is the same as "lm loss", and the two times share a panel.
    assert names == {
        *("lm loss", "lm loss by source", "held-out lm loss by source", "learning rate", "time per step"),
        *("peak memory (GiB)", f"x{SCRIPT}", "consumed samples"),
    }
    (loss,) = (panel for panel in panels if panel.title == "lm loss")
    assert [curve.kind for curve in loss.curves] == ["raw", "smooth", "points"]
    assert loss.curves[1].y.tolist() == smoothed(run.metrics.column("lm loss").values, 4).tolist()
    assert loss.smoothing == "bold: moving average over 4 log lines"
    assert loss.is_log
    # 39 steps of 0.5 s, a tenth of it waiting, in the 39 s between the two lines.
    assert step_seconds(run) == pytest.approx((19.5, 1.95, 39.0))


def test_the_page_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run")
    main([str(folder), "--png", str(tmp_path / "new" / "charts.png")])
    text = (folder / "report.html").read_text()
    assert capsys.readouterr().out.split() == [str(folder / "report.html"), str(tmp_path / "new" / "charts.png")]
    assert "<script" not in text.lower() and "&lt;script&gt;alert(1)&lt;/script&gt; 29" in text
    # Nothing but data is loaded, and nothing may be.
    assert set(re.findall(r'(?:src|href)="([^:"]*)', text)) == {"data"}
    assert "default-src 'none'" in text
    for words in (
        *("needs a person", "a loss is", "step 40", "40 of 50", "step 20, step 40", "debug/rank1.txt"),
        *("waiting for the loader: 5.0 %", "21 steps between are left out", "--lr 0.001", "differ from haplovl-debug"),
        *("samples.jsonl: 1 of 31 lines are broken", "1 answers were given again", 'alt="one.png"'),
    ):
        assert words in text, words
    with Image.open(tmp_path / "new" / "charts.png") as image:
        assert image.format == "PNG" and min(image.size) > 300


def test_two_runs_side_by_side(tmp_path: Path) -> None:
    one, other = make_run(tmp_path / "one" / "full"), make_run(tmp_path / "other" / "full", lr=2e-3)
    main([str(one), str(other), "--html", str(tmp_path / "both.html")])
    text = (tmp_path / "both.html").read_text()
    assert "one/full and other/full" in text
    assert "<tr><td>--lr</td><td>0.001</td><td>0.002</td></tr>" in text
    runs = [read_run(one), read_run(other)]
    (loss,) = (panel for panel in panels_of(runs, 4) if panel.title == "lm loss")
    assert [curve.run for curve in loss.curves] == [0, 0, 0, 1, 1, 1]
    configs = [run.config for run in runs if run.config is not None]
    assert differing_settings(configs) == [("--lr", ["0.001", "0.002"])]
    assert unusual_settings(configs[1]) == ("haplovl-debug", ["--mock-data", "--lr 0.002", "--train-iters 50"])


def test_a_run_that_has_only_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "run" / "metrics.jsonl", line(1, loss=2.0))
    main([str(tmp_path / "run")])
    assert "no checkpoint, so the settings are not known" in capsys.readouterr().err
    text = (tmp_path / "run" / "report.html").read_text()
    assert "no last words: it is running, or was killed" in text
    write_lines(tmp_path / "elsewhere.jsonl")
    (tmp_path / "run" / "last_words.json").write_text('{"code": 0')
    answer = {"step": 1, "question_id": "q", "question": "?", "answer": "a", "images": ["no.png"]}
    write_lines(tmp_path / "run" / "samples.jsonl", answer)
    main([str(tmp_path / "run"), "--metrics", str(tmp_path / "elsewhere.jsonl"), "--html", str(tmp_path / "e.html")])
    text = (tmp_path / "e.html").read_text()
    assert "elsewhere.jsonl is empty" in text and "not valid JSON" in text and "no.png is not shown" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing"], "missing: no such folder; give the --save folder of a run"),
        (["."], "holds nothing of a run"),
        ([".", "--metrics", "a", "b"], "--metrics names 2 files for 1 runs"),
        ([".", "--metrics", "a"], "a cannot be read: No such file"),
        ([".", "--smooth", "0"], "--smooth must be at least 1, got 0"),
    ],
)
def test_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=re.escape(message)):
        main(words)
