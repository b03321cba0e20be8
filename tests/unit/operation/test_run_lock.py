"""One run at a time in a --save folder: live, dead, stopped, distant and racing holders."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import threading
import time

import pytest

from megatron_haplovl.operation import run_lock
from megatron_haplovl.operation.holder import Holder
from megatron_haplovl.operation.operation import Operation
from megatron_haplovl.operation.run_lock import LOCK_FILE, take_run_lock
from megatron_haplovl.parallel.groups import Group

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
    for name, seconds in (("BEAT_SECONDS", 0.1), ("SILENCE_SECONDS", 1.0), ("GRACE_SECONDS", 0.3)):
        monkeypatch.setattr(run_lock, name, seconds)


def take(folder, run_id="mine"):
    return take_run_lock(folder, run_id, Group(), lambda: None)


def holder_of(folder):
    return Holder.parse((folder / LOCK_FILE).read_text())


def elsewhere(folder, **changes):
    """A lock of a process on another machine."""
    holder = dataclasses.replace(Holder.this_process("theirs"), host="node7", machine="another one", **changes)
    (folder / LOCK_FILE).write_text(holder.text())
    return holder


@pytest.fixture
def other_process(tmp_path):
    """A process that holds the lock, and beats."""

    def hold(ready):
        lock = take(tmp_path, "theirs")
        ready.set()
        time.sleep(60)
        del lock

    ready = FORK.Event()
    process = FORK.Process(target=hold, args=(ready,), daemon=True)
    process.start()
    assert ready.wait(30)
    yield process
    process.kill()
    process.join()


def test_the_lock_names_its_holder_and_is_given_back(tmp_path):
    lock = take(tmp_path / "new")
    names = json.loads((tmp_path / "new" / LOCK_FILE).read_text())
    assert (names["pid"], names["host"], names["run_id"]) == (os.getpid(), os.uname().nodename, "mine")
    lock.check()
    lock.release()
    assert list((tmp_path / "new").iterdir()) == []


def test_the_heartbeat_moves(tmp_path):
    lock = take(tmp_path)
    first = (tmp_path / LOCK_FILE).stat().st_mtime_ns
    time.sleep(0.5)
    assert (tmp_path / LOCK_FILE).stat().st_mtime_ns > first
    lock.release()


@pytest.mark.parametrize("state", ["is alive", "was stopped by a signal"])
def test_a_live_holder_on_this_machine_is_named(tmp_path, other_process, state):
    if state != "is alive":
        os.kill(other_process.pid, signal.SIGSTOP)
    with pytest.raises(ValueError) as refused:
        take(tmp_path)
    expected = f"belongs to run theirs (process {other_process.pid} on {os.uname().nodename}), which {state}; "
    assert expected in str(refused.value)
    assert f"kill {other_process.pid} on" in str(refused.value) and "give another --save" in str(refused.value)
    assert holder_of(tmp_path).run_id == "theirs"


def test_a_holder_that_ends_in_time_is_waited_for(tmp_path, other_process, monkeypatch):
    monkeypatch.setattr(run_lock, "GRACE_SECONDS", 20.0)
    threading.Timer(0.5, other_process.kill).start()
    threading.Timer(0.7, other_process.join).start()
    take(tmp_path).release()


def test_a_dead_holder_is_replaced_at_once(tmp_path, other_process, log_lines):
    other_process.kill()
    other_process.join()
    started = time.monotonic()
    lock = take(tmp_path)
    assert time.monotonic() - started < 1.0
    assert any(f"taken over from run theirs (process {other_process.pid} on" in line for line in log_lines)
    assert holder_of(tmp_path).run_id == "mine"
    lock.release()


def test_a_process_id_that_is_used_again_is_another_process(tmp_path):
    me = Holder.this_process("theirs")
    # A parent may have begun in the same tick as its child, but in no later one.
    parent = dataclasses.replace(me, pid=os.getppid(), started=me.started + 1)
    assert parent.is_gone and not dataclasses.replace(me, run_id="x").is_gone
    (tmp_path / LOCK_FILE).write_text(parent.text())
    take(tmp_path).release()


@pytest.mark.parametrize("content", ["a holder", "", "{", '{"pid": "1"}', "[" * 5000, "\x00\xff"])
def test_what_this_machine_cannot_judge_is_dead_when_it_stands_still(tmp_path, content, log_lines):
    (tmp_path / LOCK_FILE).write_text(content)
    if content == "a holder":
        elsewhere(tmp_path)
    started = time.monotonic()
    lock = take(tmp_path)
    assert 0.8 < time.monotonic() - started < 10.0
    assert any("whose heartbeat has stood still for 1 s" in line for line in log_lines)
    lock.release()


def test_a_heartbeat_that_is_old_already_is_not_waited_for_so_long(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "SILENCE_SECONDS", 600.0)
    elsewhere(tmp_path)
    os.utime(tmp_path / LOCK_FILE, (time.time() - 700, time.time() - 700))
    take(tmp_path).release()


def test_a_holder_elsewhere_whose_heartbeat_moves_is_named(tmp_path):
    holder = elsewhere(tmp_path)
    end = threading.Event()

    def beat():
        while not end.wait(0.1):
            os.utime(tmp_path / LOCK_FILE)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(ValueError, match=rf"run theirs \(process {holder.pid} on node7\), which is alive"):
        take(tmp_path)
    end.set()
    thread.join()


def test_who_lost_the_lock_notices_before_it_publishes(tmp_path):
    operation = Operation("mine")
    operation.lock_folder(str(tmp_path), Group())
    operation.require_lock()
    operation.notice_lost_lock()
    elsewhere(tmp_path)
    with pytest.raises(ValueError, match=r"run.lock is that of run theirs .* publishes nothing more"):
        operation.require_lock()
    time.sleep(0.5)
    with pytest.raises(ValueError, match="is that of run theirs"):
        operation.notice_lost_lock()
    operation.release()
    assert holder_of(tmp_path).run_id == "theirs"


def test_a_lock_that_was_removed_is_lost(tmp_path):
    lock = take(tmp_path)
    (tmp_path / LOCK_FILE).unlink()
    with pytest.raises(ValueError, match=r"run.lock is gone"):
        lock.check()
    lock.release()


def race(folder, start, results):
    start.wait()
    try:
        lock = take(folder, str(os.getpid()))
    except ValueError as error:
        results.put((os.getpid(), str(error)))
        return
    results.put((os.getpid(), "won"))
    time.sleep(3.0)
    lock.check()
    os._exit(0)  # without giving it back


@pytest.mark.parametrize("before", ["nobody", "dead here", "silent elsewhere", "died while it took over"])
def test_one_of_many_wins(tmp_path, before, other_process):
    other_process.kill()
    other_process.join()
    if before == "nobody":
        (tmp_path / LOCK_FILE).unlink()
    if before == "silent elsewhere":
        elsewhere(tmp_path)
    if before == "died while it took over":
        (tmp_path / LOCK_FILE).rename(tmp_path / f".{LOCK_FILE}.after-nobody")
    start, results = FORK.Event(), FORK.Queue()
    racers = [FORK.Process(target=race, args=(tmp_path, start, results), daemon=True) for _ in range(6)]
    for racer in racers:
        racer.start()
    start.set()
    answers = [results.get(timeout=30) for _ in racers]
    won = [pid for pid, answer in answers if answer == "won"]
    assert len(won) == 1
    assert all(f"(process {won[0]} on" in answer for _, answer in answers if answer != "won")
    for racer in racers:
        racer.join()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]


def test_a_racer_that_was_held_up_gives_way(tmp_path, monkeypatch):
    """It had judged the holder dead, and another process was faster before it could make its own file."""
    attempt = run_lock._Attempt(tmp_path, "slow")
    elsewhere(tmp_path)
    judged = run_lock._read(tmp_path / LOCK_FILE)
    faster = take(tmp_path, "fast")
    assert attempt._replace(judged) is None
    faster.check()
    faster.release()


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--save .*/file: no checkpoint can be written there"):
        take(tmp_path / "file")
