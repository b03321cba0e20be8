"""What is asked of NCCL's flight recorder, and what the user has decided stays."""

import pytest

from megatron_haplovl.config.schema import CheckpointConfig
from megatron_haplovl.engine.flight_recorder import record_collectives

WANTED = {
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "TORCH_FR_DUMP_TEMP_FILE": "runs/a/debug/nccl_rank_",
}


@pytest.mark.parametrize(
    ("given", "replaced"),
    [
        ({}, None),
        ({"TORCH_FR_BUFFER_SIZE": "0"}, "TORCH_FR_BUFFER_SIZE"),
        ({"TORCH_NCCL_TRACE_BUFFER_SIZE": "0"}, "TORCH_FR_BUFFER_SIZE"),
        ({"TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}, "TORCH_NCCL_DUMP_ON_TIMEOUT"),
        ({"TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/tmp/x"}, "TORCH_FR_DUMP_TEMP_FILE"),
    ],
)
def test_the_user_decides(given, replaced):
    environment = dict(given)
    record_collectives(environment, CheckpointConfig(save="runs/a"))
    assert environment == {name: value for name, value in WANTED.items() if name != replaced} | given


def test_without_a_folder_torch_decides_where():
    environment: dict[str, str] = {}
    record_collectives(environment, CheckpointConfig())
    assert "TORCH_FR_DUMP_TEMP_FILE" not in environment and environment["TORCH_FR_BUFFER_SIZE"] == "2000"
