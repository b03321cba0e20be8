"""A phase runs once, again when anything it depends on changes, and counts as done only when it ended well."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples.common.phases import Phase
from examples.common.runner import Ending, run_recipe
from examples.common.scheduler import run_phases, shorten

REPOSITORY = Path(__file__).parents[3]


def phase(name: str, code: str, **settings) -> Phase:
    return Phase(name, (sys.executable, "-c", code), **settings)


def append(path: Path, text: str = "x") -> str:
    return f"open({str(path)!r}, 'a').write({text!r})"


def wait_for(path: Path) -> str:
    """Code that fails after a minute in vain."""
    wait = f"for _ in range(6000): os.path.exists({str(path)!r}) or time.sleep(0.01)"
    return f"import os, time\n{wait}\nopen({str(path)!r})\n"


def test_runs_once_and_again_after_a_change(tmp_path, capsys):
    run, source, trace = tmp_path / "run", tmp_path / "source.py", tmp_path / "trace"
    source.write_text("1")

    def first(code: str = append(trace)) -> list[Phase]:
        return [phase("first", code, inputs=[tmp_path])]

    assert run_phases(first(), run, 2) == 0
    assert "done before" not in capsys.readouterr().out
    assert run_phases(first(), run, 2) == 0
    assert "done before" in capsys.readouterr().out
    assert trace.read_text() == "x"
    source.write_text("2")
    run_phases(first(), run, 2)
    assert trace.read_text() == "xx"
    run_phases(first(append(trace) + "  # other words"), run, 2)
    assert trace.read_text() == "xxx"


def test_a_phase_depends_on_earlier_ones(tmp_path):
    trace = tmp_path / "trace"
    first = phase("first", "pass")
    later = phase("second", append(trace), after=[first])
    for alone in ([later], [later, first]):
        with pytest.raises(ValueError, match="the earlier phase 'first' is not among the phases before 'second'"):
            run_phases(alone, tmp_path, 2)
    for version in ("1", "1", "2"):
        first = phase("first", f"version = {version}")
        run_phases([first, phase("second", append(trace), after=[first])], tmp_path, 2)
    assert trace.read_text() == "xx"


def test_a_failed_phase_is_not_done_and_starts_from_scratch(tmp_path, capfd):
    output = tmp_path / "out" / "half"
    code = f"import os; os.makedirs({str(output)!r}); print('the reason'); raise SystemExit(3)"
    bad = phase("bad", code, outputs=[tmp_path / "out"])
    for _ in range(2):  # makedirs would fail the second time, were the folder still there
        assert run_phases([bad, phase("later", append(tmp_path / "trace"), after=[bad])], tmp_path, 2) == 3
        assert "the reason" in capfd.readouterr().err
    assert not (tmp_path / "phases" / "bad.json").exists()
    assert "the reason" in (tmp_path / "phases" / "bad.log").read_text()
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("where", [".", "..", "../elsewhere"])
def test_removes_nothing_outside_its_run(tmp_path, where):
    run, precious = tmp_path / "run", tmp_path / "elsewhere" / "precious"
    precious.mkdir(parents=True)
    inside = run / "inside"
    inside.mkdir(parents=True)
    phases = [phase("first", append(tmp_path / "trace")), phase("p", "pass", outputs=[inside, run / where])]
    with pytest.raises(ValueError, match="is not inside the run folder"):
        run_phases(phases, run, 1)
    assert precious.exists()
    assert inside.exists()
    # Said before anything begins.
    assert not (tmp_path / "trace").exists()


def test_removes_nothing_behind_a_link_that_an_earlier_phase_has_made(tmp_path):
    run, precious = tmp_path / "run", tmp_path / "elsewhere" / "precious"
    precious.mkdir(parents=True)
    link = phase("link", f"import os; os.symlink({str(precious.parent)!r}, {str(run / 'link')!r})")
    with pytest.raises(ValueError, match="is not inside the run folder"):
        run_phases([link, phase("p", "pass", after=[link], outputs=[run / "link" / "precious"])], run, 1)
    assert precious.exists()


def test_two_phases_of_one_name_would_share_a_marker(tmp_path):
    with pytest.raises(ValueError, match="two phases have the name 'p'"):
        run_phases([phase("p", "1"), phase("p", "2")], tmp_path, 2)


def test_independent_phases_run_at_the_same_time(tmp_path):
    """Each waits for what the other writes."""
    a, b, both = tmp_path / "a", tmp_path / "b", tmp_path / "both"
    first = phase("first", append(a) + "\n" + wait_for(b))
    second = phase("second", append(b) + "\n" + wait_for(a))
    last = phase("last", append(both), after=[first, second])
    assert run_phases([first, second, last], tmp_path / "run", 2) == 0
    assert both.exists()


def test_no_more_phases_run_at_once_than_are_allowed_and_in_their_order(tmp_path):
    trace = tmp_path / "trace"
    phases = [phase(name, f"{append(trace, name)}\n{append(trace, name)}") for name in "cab"]
    assert run_phases(phases, tmp_path / "run", 1) == 0
    assert trace.read_text() == "ccaabb"


def runs(pid: str) -> bool:
    """Whether there is such a process; a zombie has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def all_end(pids: Path) -> bool:
    """Whether the processes whose numbers are in a file end soon."""
    deadline = time.monotonic() + 30
    while any(runs(pid) for pid in pids.read_text().split()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def sleeper(path: Path) -> str:
    """Code that starts a process of its own, writes both numbers and sleeps."""
    return (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(path)!r} + '.partial', 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        f"os.rename({str(path)!r} + '.partial', {str(path)!r})\n"
        "time.sleep(600)"
    )


def test_when_one_fails_the_others_are_ended_with_all_their_processes(tmp_path):
    pids = tmp_path / "pids"
    long = phase("long", sleeper(pids))
    bad = phase("bad", wait_for(pids) + "raise SystemExit(7)")
    never = phase("never", append(tmp_path / "trace"))
    started = time.monotonic()
    assert run_phases([long, bad, never], tmp_path, 2) == 7
    assert time.monotonic() - started < 60
    assert all_end(pids)
    assert not (tmp_path / "phases" / "long.json").exists()
    assert not (tmp_path / "trace").exists()


def test_a_runner_that_is_ended_leaves_nothing_running(tmp_path):
    pids = tmp_path / "pids"
    code = (
        "import argparse, sys; from pathlib import Path; from examples.common.phases import Phase\n"
        "from examples.common.runner import run_recipe, start\n"
        f"args = argparse.Namespace(run=Path({str(tmp_path)!r}), at_once=2, dry_run=False)\n"
        f"start(lambda: run_recipe(args, [Phase('long', (sys.executable, '-c', {sleeper(pids)!r}))], []))"
    )
    runner = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY)
    while not pids.exists():
        assert runner.poll() is None
        time.sleep(0.05)
    runner.send_signal(signal.SIGTERM)
    assert runner.wait(timeout=60) == 128 + signal.SIGTERM
    assert all_end(pids)


def test_a_phase_that_resumes_keeps_its_outputs_unless_something_has_changed(tmp_path):
    output = tmp_path / "steps"

    def training(end: str) -> Phase:
        return phase(
            "t", f"{append(output)}\nraise SystemExit(int(open({end!r}).read()))", outputs=[output], resumes=True
        )

    end, other = tmp_path / "end", tmp_path / "other end"
    end.write_text("1")
    other.write_text("1")
    assert run_phases([training(str(end))], tmp_path, 1) == 1
    end.write_text("0")
    assert run_phases([training(str(end))], tmp_path, 1) == 0
    assert output.read_text() == "xx"
    assert run_phases([training(str(end))], tmp_path, 1) == 0
    assert output.read_text() == "xx"
    assert run_phases([training(str(other))], tmp_path, 1) == 1
    assert output.read_text() == "x"
    assert run_phases([training(str(end))], tmp_path, 1) == 0
    assert output.read_text() == "x"


def test_variables_and_the_environments_own_python(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", os.defpath)
    code = "import os, sys; print(os.environ['NUMBER'], sys.prefix)"
    assert run_phases([Phase("p", ("python", "-c", code), environment={"NUMBER": "7"})], tmp_path, 1) == 0
    assert (tmp_path / "phases" / "p.log").read_text() == f"7 {sys.prefix}\n"


def recipe_args(run: Path, *, dry_run: bool, at_once: int = 2) -> argparse.Namespace:
    return argparse.Namespace(run=run, at_once=at_once, dry_run=dry_run)


def test_a_dry_run_prints_what_would_be_started_and_starts_and_writes_nothing(tmp_path, capsys):
    run, trace = tmp_path / "a run", tmp_path / "it's a trace"
    first = phase("first", append(trace, "1"), environment={"NUMBER": "1 2"})
    second = phase("second", append(trace, "2"), after=[first])
    ending = Ending((sys.executable, "-c", append(trace, "3")))
    assert run_recipe(recipe_args(run, dry_run=True), [first, second], [ending]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert not list(tmp_path.iterdir())
    assert [shlex.split(line) for line in lines] == [["NUMBER=1 2", *first.words], second.words, ending.words]
    subprocess.run(["bash", "-ec", "\n".join(lines)], check=True)
    assert trace.read_text() == "123"
    # What is done is not among the commands any more.
    assert run_recipe(recipe_args(run, dry_run=False), [first], []) == 0
    capsys.readouterr()
    run_recipe(recipe_args(run, dry_run=True), [first, second], [])
    out = capsys.readouterr().out
    assert "# first: done before, kept" in out
    assert shlex.join(first.words) not in out and shlex.join(second.words) in out


def test_endings_run_every_time_and_show_what_they_print(tmp_path, capfd):
    endings = [Ending((sys.executable, "-c", f"print({word!r})"), lead=f"{word}: ") for word in ("one", "two")]
    for _ in range(2):
        assert run_recipe(recipe_args(tmp_path, dry_run=False), [phase("p", "pass")], endings) == 0
        assert "one: one\ntwo: two\n" in capfd.readouterr().out
    assert run_recipe(recipe_args(tmp_path, dry_run=False), [phase("p", "raise SystemExit(4)")], endings) == 4
    assert "one" not in capfd.readouterr().out
    failing = Ending((sys.executable, "-c", "raise SystemExit(5)"))
    assert run_recipe(recipe_args(tmp_path, dry_run=False), [], [failing, endings[1]]) == 5
    assert "two" not in capfd.readouterr().out


def test_at_least_one_phase_at_a_time(tmp_path):
    with pytest.raises(ValueError, match="--at-once must be at least 1, got 0"):
        run_recipe(recipe_args(tmp_path, dry_run=False, at_once=0), [], [])


def test_shows_losses_of_a_training_line():
    line = "iteration       10/     100 | consumed samples: 80 | learning rate: 1.0E-3 | lm loss: 2.5E+00 |"
    assert shorten(line) == "iteration       10/     100 | lm loss: 2.5E+00"
    assert len(shorten("x" * 500)) == 150
