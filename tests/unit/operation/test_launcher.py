"""A rank ends with its launcher; a process that nobody has launched outlives its shell."""

import os
import subprocess
import sys

import pytest

from megatron_haplovl.operation import launcher
from megatron_haplovl.operation.launcher import Launcher


@pytest.mark.parametrize(
    ("variable", "name"), [("TORCHELASTIC_RUN_ID", "torchrun"), ("CROSS_RANK", "deepspeed"), (None, None)]
)
def test_the_parent(monkeypatch, variable, name):
    started = Launcher({variable: "1"} if variable else {})
    assert started.gone() is None
    monkeypatch.setattr(os, "getppid", lambda: 1)
    gone = started.gone()
    assert gone is None if name is None else gone is not None and name in gone


@pytest.mark.parametrize("words", ["init", "/usr/lib/systemd/systemd\0--user"])
def test_a_launcher_that_was_gone_before_its_rank_began(monkeypatch, words):
    monkeypatch.setattr(os, "getppid", lambda: 1 if words == "init" else 77)
    monkeypatch.setattr(launcher, "_command_line", lambda pid: words.split("\0"))
    gone = Launcher({"TORCHELASTIC_RUN_ID": "1"}).gone()
    assert gone is not None and "before this rank began" in gone
    assert Launcher({}).gone() is None


def test_a_launcher_may_be_the_first_process_of_a_container(monkeypatch):
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setattr(launcher, "_command_line", lambda pid: ["/usr/bin/python", "/usr/bin/torchrun", "train.py"])
    assert Launcher({"TORCHELASTIC_RUN_ID": "1"}).gone() is None


def test_deepspeeds_runner_is_a_launcher_too(tmp_path):
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    launch = (
        "import os;"
        "from megatron_haplovl.operation.launcher import _runner; print(_runner(os.getpid()), os.getppid(), flush=True)"
    )
    for name, found in (("deepspeed", True), ("bash", False)):
        runner = tmp_path / name
        runner.write_text(program)
        ended = subprocess.run([sys.executable, str(runner), launch], stdout=subprocess.PIPE, text=True, check=True)
        seen, parent = ended.stdout.split()
        assert seen == (parent if found else "None")


def test_the_script(tmp_path):
    assert Launcher({"HAPLOVL_LAUNCH_DIR": str(tmp_path / "of another machine")}).gone() is None
    script = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    (tmp_path / "pid").write_text(f"{script.pid}\n")
    started = Launcher({"HAPLOVL_LAUNCH_DIR": str(tmp_path)})
    assert started.gone() is None
    # It is not waited for, so it stays as a zombie.
    script.kill()
    os.waitid(os.P_PID, script.pid, os.WEXITED | os.WNOWAIT)
    gone = started.gone()
    assert gone is not None and str(script.pid) in gone
    script.wait()
