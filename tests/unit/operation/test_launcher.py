"""A rank ends with its launcher; a process that nobody has launched outlives its shell."""

import os
import subprocess
import sys

import pytest

from megatron_haplovl.operation.launcher import Launcher


@pytest.mark.parametrize(
    ("variable", "name"), [("TORCHELASTIC_RUN_ID", "torchrun"), ("CROSS_RANK", "deepspeed"), (None, None)]
)
def test_the_parent(monkeypatch, variable, name):
    launcher = Launcher({variable: "1"} if variable else {})
    assert launcher.gone() is None
    monkeypatch.setattr(os, "getppid", lambda: 1)
    gone = launcher.gone()
    assert gone is None if name is None else gone is not None and name in gone


def test_the_script(tmp_path):
    assert Launcher({"HAPLOVL_LAUNCH_DIR": str(tmp_path / "of another machine")}).gone() is None
    script = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    (tmp_path / "pid").write_text(f"{script.pid}\n")
    launcher = Launcher({"HAPLOVL_LAUNCH_DIR": str(tmp_path)})
    assert launcher.gone() is None
    # It is not waited for, so it stays as a zombie.
    script.kill()
    os.waitid(os.P_PID, script.pid, os.WEXITED | os.WNOWAIT)
    gone = launcher.gone()
    assert gone is not None and str(script.pid) in gone
    script.wait()
