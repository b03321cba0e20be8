"""What another thread sees of the main thread."""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from megatron_haplovl.checkpoint.write import complete
from megatron_haplovl.operation.main_thread import MainThread, waits_for_ranks
from megatron_haplovl.operation.phase import PhaseClock


def looks(clock, during, number=3):
    """Samples that a watching thread takes while the main thread does something."""
    main, samples, ready, finished = MainThread(clock), [], threading.Event(), threading.Event()

    def watch():
        ready.wait()
        for _ in range(number):
            time.sleep(0.1)
            samples.append(main.look(1.0))
        finished.set()

    thread = threading.Thread(target=watch)
    thread.start()
    ready.set()
    during(finished)
    thread.join()
    return samples


def test_a_call_that_lasts_is_a_standstill():
    samples = looks(PhaseClock(), lambda finished: finished.wait())
    assert [sample.still for sample in samples] == [0.0, 1.0, 2.0]
    assert not any(sample.waits for sample in samples)


def test_calls_one_after_the_other_in_the_same_line_are_moves():
    def nap():
        time.sleep(0.02)

    def naps(finished):
        while not finished.is_set():
            nap()

    assert [sample.still for sample in looks(PhaseClock(), naps)] == [0.0, 0.0, 0.0]


def test_a_new_phase_is_a_move():
    clock = PhaseClock()
    main = MainThread(clock)
    stills = []
    for phase in ("forward", None, "backward", None):
        if phase is not None:
            clock.enter(phase)
        sample = main.look(1.0)
        stills.append((sample.moment.phase, sample.in_phase))
    assert stills == [("forward", 0.0), ("forward", 1.0), ("backward", 0.0), ("backward", 1.0)]


def test_a_large_write_is_a_move_in_a_save(tmp_path):
    clock = PhaseClock()

    def write(finished):
        with (tmp_path / "large").open("wb") as file:
            while not finished.wait(0.05):
                file.write(bytes(4 << 20))
                file.seek(0)

    clock.enter("save")
    assert max(sample.still for sample in looks(clock, write)) == 0.0


def frames_while(action):
    """The frames of all threads while another thread runs `action(started, released)`."""
    started, released = threading.Event(), threading.Event()
    thread = threading.Thread(target=action, args=(started, released))
    thread.start()
    started.wait()
    time.sleep(0.3)
    frames = dict(sys._current_frames())
    released.set()
    assert thread.ident is not None
    return frames[thread.ident], frames, thread


def test_a_collective_is_a_wait():
    """By the file that its Python code is in."""
    names: dict[str, Any] = {}
    exec(compile("def all_reduce(event): event.wait()", "/lib/torch/distributed/distributed_c10d.py", "exec"), names)

    def collective(started, released):
        started.set()
        names["all_reduce"](released)

    frame, frames, thread = frames_while(collective)
    assert waits_for_ranks(frame, frames)
    thread.join()


class _Work:
    """As torch's: its function is of C and has no frame of its own."""

    def __init__(self):
        lock = threading.Lock()
        lock.acquire()
        self.wait, self.release = lock.acquire, lock.release


def test_a_handle_is_a_wait():
    work = _Work()

    def handle(started, released):
        started.set()
        work.wait()

    frame, frames, thread = frames_while(handle)
    assert waits_for_ranks(frame, frames)
    work.release()
    thread.join()


def test_completing_a_checkpoint_is_a_wait(tmp_path):
    """For the other ranks' parts: in the main thread, and in the one that writes beside the training."""

    def until_all_have_written(_started=None, _released=None):
        try:
            complete(tmp_path, tmp_path / "done", 1, {}, torch.float32, 3.0, "a run")
        except OSError:
            return

    def main_thread(started, released):
        started.set()
        until_all_have_written()

    frame, frames, thread = frames_while(main_thread)
    assert waits_for_ranks(frame, frames)
    (tmp_path / "rank-00000.failed").touch()
    thread.join()
    (tmp_path / "rank-00000.failed").unlink()

    def beside(started, released):
        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(until_all_have_written)
            started.set()
            writing.result()

    frame, frames, thread = frames_while(beside)
    assert waits_for_ranks(frame, frames)
    assert not waits_for_ranks(sys._getframe(), frames)
    Path(tmp_path / "rank-00000.failed").touch()
    thread.join()
