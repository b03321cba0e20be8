"""How a process finds out that it is one of several."""

from __future__ import annotations

import pytest

from megatron_haplovl.config.cli import build_config
from megatron_haplovl.engine.processes import check_started_alone, initialize_processes


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_one_of_several_without_a_rank_is_refused(monkeypatch, name):
    config = build_config("finetune", "haplovl-debug", {("data", "mock_data"): True, ("run", "device"): "cpu"})
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # initialize_processes sets it, too; put back afterwards
    monkeypatch.setenv(name, "8")
    with pytest.raises(ValueError, match=f"{name}=8: .* let deepspeed or torchrun start"):
        initialize_processes(config)


def test_a_job_step_of_one_process_trains_alone(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    check_started_alone()
