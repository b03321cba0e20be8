"""A run that dies between two checkpoints goes on from the copies on its machines' disks; two ranks, two "machines"."""

from __future__ import annotations

import pytest

from tests.distributed.launch import run_ranks
from tests.metrics_files import logged


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    return folder, run_ranks("worker_local_copies.py", 2, str(folder))


def losses(folder, name):
    lines = logged(folder / f"{name}.jsonl")
    return [(line["iteration"], line["loss"], line["grad norm"]) for line in lines]


def test_the_copy_is_newer_than_the_checkpoint(launch):
    folder, output = launch
    assert losses(folder, "resumed before") + losses(folder, "resumed") == losses(folder, "whole")
    assert [step for step, *_ in losses(folder, "resumed")] == [4, 5, 6]
    assert "global_step3: sending " in output.replace("global_step3/", "")


def test_a_machine_that_is_lost_costs_the_steps_since_the_checkpoint(launch):
    folder, output = launch
    assert losses(folder, "lost") == losses(folder, "whole")[2:]
    assert "global_step3 is not used: rank-00001.safetensors is whole on none of the 2 machines" in output


def test_another_layout_reads_the_copy(launch):
    folder, _ = launch
    expected = losses(folder, "whole")[3:]
    assert [step for step, *_ in losses(folder, "layout")] == [4, 5, 6]
    for (_, loss, norm), (_, loss_before, norm_before) in zip(losses(folder, "layout"), expected, strict=True):
        assert (loss, norm) == pytest.approx((loss_before, norm_before), rel=1e-4)


def test_one_copy_is_kept_on_each_machine(launch):
    folder, _ = launch
    for rank in range(2):
        for copies in (folder / f"machine{rank}").iterdir():
            assert [path.name for path in copies.iterdir()] == ["global_step5"]
            files = {path.name for path in (copies / "global_step5").iterdir()}
            assert files == {"config.json", "manifest.json", "training_state.json", f"rank-0000{rank}.safetensors"}
