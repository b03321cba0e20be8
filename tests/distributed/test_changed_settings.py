"""Resuming takes the optimizer's settings from the flags, and refuses data in another order."""

from tests.distributed.launch import run_ranks


def test_flags_win_over_the_checkpoint_and_other_data_is_refused(tmp_path):
    lines = run_ranks("worker_changed_settings.py", 1, str(tmp_path)).splitlines()
    assert [line for line in lines if line.startswith("SETTINGS")] == ["SETTINGS 3.0 [0.0, 0.25] [(0.9, 0.5)] 7.0"] * 4
    refused = [line for line in lines if line.startswith("REFUSED")]
    assert len(refused) == 4
    assert all("was trained on other data" in line and "--seq-length" in line for line in refused)
