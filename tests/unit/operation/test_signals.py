"""A signal is remembered, whatever the main thread waits for; before the first step it ends the process at once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from megatron_haplovl.data.worker_signals import STOP_SIGNALS, end_workers, ignore_stop_signals
from megatron_haplovl.operation.signals import StopSignals
from megatron_haplovl.parallel.launch import Launch

REPOSITORY = Path(__file__).parents[3]


def launch(folder: Path, *, scripted: bool = False) -> Launch:
    return Launch(folder=folder, is_scripted=scripted, began=time.time(), restart=0, process_began=time.time())


@pytest.fixture
def listening(tmp_path):
    made = []

    def listen(**settings):
        signals: Any = StopSignals(launch(tmp_path, **settings))
        made.append(signals)
        signals.ended = []
        signals.may_wait = lambda: True
        signals.at_once = signals.ended.append
        return signals

    yield listen
    for signals in made:
        signals.close()


def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_is_remembered_and_does_nothing_else(listening, number):
    before = signal.getsignal(number)
    signals = listening()
    os.kill(os.getpid(), number)
    wait_until(lambda: signals.received == number.name)
    assert signals.ended == []
    signals.close()
    assert signal.getsignal(number) is before
    signals.close = lambda: None


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_what_was_ignored_at_the_start_stays_ignored(listening, number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        signals = listening()
        os.kill(os.getpid(), number)
        assert signal.getsignal(number) is signal.SIG_IGN
        signals.close()
        signals.close = lambda: None
        assert signals.received is None
    finally:
        signal.signal(number, before)


def test_before_the_first_step_it_ends_the_run(listening):
    signals = listening()
    signals.may_wait = lambda: False
    os.kill(os.getpid(), signal.SIGTERM)
    wait_until(lambda: signals.ended)
    assert "SIGTERM before the first step" in signals.ended[0].sentence
    assert signals.ended[0].code == 75


def test_a_second_interrupt_ends_the_run_and_an_echo_does_not(listening, monkeypatch):
    signals = listening()
    signals.receive("SIGINT", may_be_echo=True)
    signals.receive("SIGINT", may_be_echo=True)
    signals.receive("SIGTERM", may_be_echo=False)
    assert signals.ended == []
    monkeypatch.setattr("megatron_haplovl.operation.signals._SECONDS_UNTIL_ANOTHER", 0.0)
    signals.receive("SIGINT", may_be_echo=True)
    assert [ending.code for ending in signals.ended] == [75]


def test_the_launch_script_writes_what_it_got(listening, tmp_path):
    signals = listening(scripted=True)
    (tmp_path / "leave").write_text("SIGHUP\n")
    wait_until(lambda: signals.received == "SIGHUP")
    (tmp_path / "leave").write_text("SIGHUP\nSIGINT\n")
    wait_until(lambda: signals.ended)


@pytest.mark.parametrize("entry", ["pretrain_haplovl.py", "finetune_haplovl.py"])
@pytest.mark.parametrize("scripted", [False, True])
def test_a_signal_while_libraries_are_loaded(tmp_path, entry, scripted):
    """The entry scripts listen before they import torch."""
    program = f"""
import os, runpy, signal, sys, time
class Importing:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('torch', 'numpy'):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
sys.meta_path.insert(0, Importing())
runpy.run_path({str(REPOSITORY / entry)!r}, run_name='__main__')
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TMPDIR": str(tmp_path)}
    if scripted:
        environment["HAPLOVL_LAUNCH_DIR"] = str(tmp_path)
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert ended.stderr == "SIGTERM before the first step: nothing is lost; the same command starts again\n"
    assert ended.returncode == (0 if scripted else 75)
    assert (tmp_path / "ending").exists() == scripted


class Slow:
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return os.getpid()


def test_loader_workers_ignore_what_asks_a_run_to_stop():
    slow: Any = Slow()
    batches = iter(DataLoader(slow, batch_size=None, num_workers=1, worker_init_fn=ignore_stop_signals))
    worker = int(next(batches))
    for number in STOP_SIGNALS:
        os.kill(worker, number)
    assert int(next(batches)) == worker
    before = signal.getsignal(signal.SIGCHLD)
    end_workers()
    assert signal.getsignal(signal.SIGCHLD) is before
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_a_program_without_a_supervisor_ends_with_workers_that_are_left():
    """Here the iterator outlives the loader, as DeepSpeed's pipeline keeps it."""
    program = """
import sys, torch
from torch.utils.data import DataLoader
from megatron_haplovl.data.worker_signals import end_workers_at_exit, ignore_stop_signals
end_workers_at_exit()
sys.kept = iter(DataLoader(range(100), batch_size=None, num_workers=1, worker_init_fn=ignore_stop_signals))
next(sys.kept)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
