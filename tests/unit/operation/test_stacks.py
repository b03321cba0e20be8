"""A stopped process is ended, and its stacks are written down before."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_haplovl.operation.stacks import StackFile, abort, debug_folder, open_stack_file, wake
from megatron_haplovl.parallel.process_table import is_running

_STOPPED = """
import os, pathlib, signal, sys, threading
from megatron_haplovl.operation.stacks import StackFile
def where_it_stops():
    os.kill(os.getpid(), signal.SIGSTOP)
def leave():
    # Not before the other thread is stopped, and has gone on for a while.
    while stacks.path.stat().st_size == 0:
        pass
    threading.Event().wait(1)
    os._exit(70)
stacks = StackFile(pathlib.Path(sys.argv[1]), "abc", 1)
threading.Thread(target=leave).start()
where_it_stops()
os._exit(1)
"""


def _stopped(folder):
    process = subprocess.Popen([sys.executable, "-c", _STOPPED, str(folder)])
    end = time.monotonic() + 120
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.1)
    assert is_running(process.pid)
    return process


def test_a_stopped_process(tmp_path):
    process = _stopped(tmp_path)
    abort([process.pid])
    assert process.wait() == -signal.SIGABRT
    assert "where_it_stops" in (tmp_path / "stacks_abc_rank_1.txt").read_text()
    assert not is_running(process.pid)
    abort([process.pid])


def test_a_stopped_process_that_ends_by_itself(tmp_path):
    """Another of its threads ends it; the main thread does not leave the place where it was stopped."""
    process = _stopped(tmp_path)
    wake([process.pid])
    abort([process.pid], 60.0)
    assert process.wait() == 70
    assert "where_it_stops" in (tmp_path / "stacks_abc_rank_1.txt").read_text()


def test_the_file_of_a_rank_that_never_hung_is_removed(tmp_path):
    stacks = StackFile(tmp_path / "debug", "abc", 0)
    stacks.close()
    assert not (tmp_path / "debug").exists()
    stacks = StackFile(tmp_path / "debug", "abc", 0)
    stacks.dump("asked for")
    stacks.close()
    text = stacks.path.read_text()
    assert "asked for" in text and "test_the_file_of_a_rank" in text


def test_a_folder_that_takes_no_files(tmp_path, monkeypatch, caplog):
    (tmp_path / "save").touch()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    stacks = open_stack_file(str(tmp_path / "save"), "abc", 0)
    assert stacks is not None and stacks.folder == debug_folder(None, "abc")
    stacks.close()
