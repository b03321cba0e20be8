"""A flipped bit in one rank's weights (row 17): found at the next comparison, before anything is updated or saved."""

from __future__ import annotations

from tests.faults.run import command, ends_as_undisturbed, last_words, run_to_end


def test_the_rank_and_the_parameter_are_named(tmp_path):
    run = tmp_path / "run"
    flags = ["--train-iters", "6", "--check-replicas", "2", "--zero-stage", "1", "--save", str(run), "--load", str(run)]
    words = command("torchrun", 2, "finetune", [*flags, "--metrics-file", str(tmp_path / "metrics.jsonl")])
    ended = run_to_end(words, tmp_path / "log", HAPLOVL_FAULT="bit_flip@4:1")
    assert ended.code == 1 and last_words(run)["code"] == 70, ended.output[-3000:]
    assert "[rank 0] --check-replicas: every 2 steps and before every save, " in ended.output
    said = (
        "step 4: connector.weight on rank 1 differs from the other ranks' copy; that points to the memory of its "
        "machine; the weights were not updated. Started again, the run goes on from its last checkpoint; if the same "
        "rank is named again, take its machine out"
    )
    assert said in ended.output, ended.output[-3000:]
    assert not (run / "latest").exists()
    ends_as_undisturbed(words, tmp_path)
