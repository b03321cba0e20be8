"""Ranks that `deepspeed` has started find a port by themselves on one machine, and say so where they cannot."""

import os
import socket
import threading
import time

import pytest

from megatron_haplovl.engine.processes import settle_port
from megatron_haplovl.parallel.launch import Launch


@pytest.fixture
def launch(tmp_path):
    return Launch(
        folder=tmp_path / "launch", is_scripted=False, began=time.time(), restart=0, process_began=time.time()
    )


def settle(launch, monkeypatch, rank, size, here, port=29500):
    for name, value in (("RANK", rank), ("WORLD_SIZE", size), ("LOCAL_SIZE", here), ("MASTER_PORT", port)):
        monkeypatch.setenv(name, str(value))
    settle_port(launch, 10.0)
    return int(os.environ["MASTER_PORT"])


def test_rank_0_takes_a_free_port_and_the_others_follow(launch, monkeypatch):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        taken = other.getsockname()[1]
        chosen = settle(launch, monkeypatch, 0, 2, 2, taken)
        assert chosen != taken
        assert settle(launch, monkeypatch, 1, 2, 2, taken) == chosen


def test_a_rank_waits_for_rank_0(launch, monkeypatch):
    launch.make_folder()
    threading.Timer(0.3, lambda: (launch.folder / "port").write_text("1234")).start()
    assert settle(launch, monkeypatch, 1, 2, 2) == 1234


def test_a_silent_rank_0_is_named(launch, monkeypatch):
    monkeypatch.setattr("time.monotonic", iter([0.0, 11.0]).__next__)
    with pytest.raises(TimeoutError, match="rank 0 has not said in 10 s which port"):
        settle(launch, monkeypatch, 1, 2, 2)


def test_on_several_machines_a_taken_port_is_refused(launch, monkeypatch):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        taken = other.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {taken} of .* is taken.*--master_port N.*MASTER_PORT=N"):
            settle(launch, monkeypatch, 0, 4, 2, taken)
        assert settle(launch, monkeypatch, 1, 4, 2, taken) == taken
    assert settle(launch, monkeypatch, 0, 4, 2, taken) == taken
