"""When processes of a launch started, which decides whose last words are those of this start."""

from __future__ import annotations

import os
import subprocess
import time

from megatron_haplovl.parallel import launch
from megatron_haplovl.parallel.launch import Launch


def test_the_start_of_a_process_is_known_to_a_fraction_of_a_second() -> None:
    before = time.time()
    with subprocess.Popen(["sleep", "60"]) as process:
        after = time.time()
        started = launch._started(process.pid)
        process.kill()
    assert before - 0.02 <= started <= after + 0.02


def test_all_ranks_of_a_launcher_have_one_folder(monkeypatch) -> None:
    """Whenever they ask; the time of its start, as they see it, differs in its last digits."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("HAPLOVL_LAUNCH_DIR", raising=False)
    folders = set()
    for _ in range(20):
        found = Launch.of_environment()
        folders.add(found.folder)
        assert found.began <= found.process_began + 0.02
        assert abs(found.process_began - launch._started(os.getpid())) < 0.02
        time.sleep(0.01)
    assert len(folders) == 1
