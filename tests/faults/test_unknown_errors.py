"""An exception that nobody has foreseen is a machine's fault: the run may be started again."""

from __future__ import annotations

from tests.faults.run import command, run_to_end


def test_deepspeed_hands_on_our_code(tmp_path):
    words = command("deepspeed", 2, "finetune", ["--train-iters", "3"])
    ended = run_to_end(words, tmp_path / "log", HAPLOVL_FAULT="unknown_error@2:1")
    assert ended.code == 70, ended.output[-3000:]
    assert "RuntimeError: an exception that nobody has foreseen" in ended.output
