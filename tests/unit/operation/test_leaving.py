"""A run leaves for a signal, an exit file, the time or an interval; the first of them is the reason."""

from typing import Any

import pytest

from megatron_haplovl.config.schema import CheckpointConfig
from megatron_haplovl.data.worker_signals import STOP_SIGNALS
from megatron_haplovl.operation.leaving import Leaving
from megatron_haplovl.parallel.groups import Group


class Heard:
    """Stands for StopSignals."""

    def __init__(self, received):
        self.received = received


def leaving(signal=None, group=None, **settings):
    heard: Any = Heard(signal)
    return Leaving(CheckpointConfig(**settings), group or Group(), heard)


@pytest.mark.parametrize("name", [number.name for number in STOP_SIGNALS])
def test_a_signal_is_the_reason(name, tmp_path):
    (tmp_path / "exit").touch()
    assert leaving(name, save=str(tmp_path), exit_interval=1).agreed(4) == name


def test_nothing_asks():
    assert leaving(save="nowhere", exit_duration_in_mins=1).agreed(4) is None


def test_an_interval():
    asked = leaving(exit_interval=3)
    assert [asked.agreed(step) for step in (2, 3, 6)] == [None, "--exit-interval 3", "--exit-interval 3"]


@pytest.mark.parametrize("name", [None, "another name"])
def test_an_exit_file_is_obeyed_and_removed(tmp_path, monkeypatch, name):
    file = tmp_path / (name or "exit")
    asked = leaving(save=str(tmp_path), kill_switch_file=str(file) if name else None)
    assert asked.agreed(1) is None
    file.touch()
    assert asked.agreed(2) is None  # looked for once a second
    monkeypatch.setattr("megatron_haplovl.operation.leaving._SECONDS_BETWEEN_LOOKS", 0.0)
    assert asked.agreed(3) == f"the file {file} asks for it"
    asked.obeyed()
    assert not file.exists()
    asked.obeyed()


def test_only_rank_0_asks_the_file_server(tmp_path):
    (tmp_path / "exit").touch()
    other = leaving(group=Group(rank=1), save=str(tmp_path))
    assert other.agreed(1) is None
    other.obeyed()
    assert (tmp_path / "exit").exists()


def test_the_time_is_over(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    asked = leaving(exit_duration_in_mins=2)
    now[0] += 119.9
    assert asked.agreed(1) is None
    now[0] += 0.1
    assert asked.agreed(2) == "--exit-duration-in-mins 2"


def test_the_time_of_earlier_starts_counts():
    asked = Leaving(CheckpointConfig(save="nowhere", exit_duration_in_mins=2), Group(), None, seconds=121.0)
    assert asked.agreed(1) == "--exit-duration-in-mins 2"


def test_other_ranks_flags_count():
    class Told(Group):
        def largest(self, tensor):
            tensor[0] = 1 + STOP_SIGNALS.index(STOP_SIGNALS[2])
            return tensor

    assert leaving(group=Told()).agreed(1) == "SIGUSR1"
