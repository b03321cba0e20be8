"""Checkpoints that are kept, written beside the training, refused by a full disk, or damaged; on two ranks."""

from __future__ import annotations

import json

import pytest

from tests.distributed.launch import run_ranks
from tests.metrics_files import logged


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saving")
    return folder, run_ranks("worker_saving.py", 2, str(folder))


def losses(folder, name):
    lines = logged(folder / f"{name}.jsonl")
    return [(line["iteration"], line["loss"], line["grad norm"]) for line in lines]


def steps(folder, name):
    return sorted(path.name for path in (folder / name).iterdir() if path.is_dir())


def test_only_the_last_ones_are_kept(launch):
    assert steps(launch[0], "whole") == ["global_step5", "global_step6"]


def test_saved_beside_the_training(launch):
    folder, output = launch
    assert losses(folder, "beside") + losses(folder, "beside resumed") == losses(folder, "whole")
    assert steps(folder, "beside") == [f"global_step{step}" for step in range(1, 7)]
    assert "of which training waited" in output


@pytest.mark.parametrize(("rank", "name"), enumerate(["full disk", "full disk beside"]))
def test_a_full_disk_does_not_end_the_run(launch, rank, name):
    folder, output = launch
    assert losses(folder, name) == losses(folder, "whole")
    # The first of these runs has since been taken back to step 2; see below.
    kept = (3, 4, 5, 6) if name == "full disk" else (1, 2, 3, 5, 6)
    assert steps(folder, name) == [f"global_step{step}" for step in kept]
    assert (folder / name / "latest").read_text().strip() == f"global_step{4 if name == 'full disk' else 6}"
    assert output.count("saving failed, the run goes on: ") == 3
    assert f"{folder / name}/.global_step4.unfinished/rank-0000{rank}.safetensors: Error" in output
    # The rank that failed says so at once, and the first one for all; the last checkpoint is tried three times.
    assert output.count("saving failed again, the run goes on: ") == 2
    assert output.count("File too large") == 2 * (3 + 2)


def test_a_run_whose_last_save_failed_ends_with_an_error(launch):
    folder, output = launch
    for rank in range(2):
        messages = json.loads((folder / f"{rank}.json").read_text())
        assert "the last checkpoint could not be saved" in messages["never saved"]
        assert f"--save {folder}/file: no checkpoint can be written there" in messages["no folder"]
    assert losses(folder, "never saved") == losses(folder, "whole")
    # Nothing was trained, so nothing was reported.
    assert not (folder / "no folder.jsonl").exists()
    assert f"warning: {folder}/yet another holds checkpoints of another run, up to global_step6" in output


def test_only_checkpoints_up_to_the_present_step_count_as_kept(launch):
    folder, _ = launch
    assert losses(folder, "back") == losses(folder, "whole")[2:4]
    assert steps(folder, "full disk") == ["global_step3", "global_step4", "global_step5", "global_step6"]


def test_damage_is_reported_and_the_one_before_is_taken_only_if_asked(launch):
    folder, output = launch
    for rank in range(2):
        messages = json.loads((folder / f"{rank}.json").read_text())
        for message in (messages["damaged"], messages["damaged weights"]):
            assert "global_step6 is damaged" in message and "rank-00001.safetensors" in message
            assert "--allow-fallback" in message
    assert losses(folder, "fallback") == losses(folder, "whole")[5:]
    assert "resuming" in output and "global_step5" in output


def test_finetuning_starts_from_the_weights_alone(launch):
    folder, output = launch
    started = losses(folder, "finetune")
    assert [step for step, _, _ in started] == list(range(1, 7))
    assert started == losses(folder, "pretrained")
    # The weights it started from have been trained for six steps.
    assert started[0][1:] != losses(folder, "whole")[0][1:]
    # Both fall-backs, with --finetune and without.
    assert output.count(f"lm_head           1 tensors  {folder}/whole/global_step5") == 2
    refused = json.loads((folder / "0.json").read_text())["other parts"]
    assert refused.startswith("post_decoder.") and "was trained in" in refused and "--finetune" in refused


def test_a_checkpoint_can_be_named_or_found_without_latest(launch):
    folder, output = launch
    # The first rank says which checkpoint it is.
    assert losses(folder, "seen by one") == losses(folder, "whole")[4:]
    assert losses(folder, "one step") == losses(folder, "whole")[4:]
    assert [step for step, _, _ in losses(folder, "without latest")] == [7]
