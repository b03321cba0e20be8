"""An exception that nobody has foreseen, or a rank that is gone: a machine's fault, so the run may be started again."""

from __future__ import annotations

import pytest

from tests.faults.run import command, ends_as_undisturbed, last_words, run_to_end

SENTENCES = {
    "unknown_error": "RuntimeError: an exception that nobody has foreseen",
    "kill": "is gone without a word; it was last seen in phase ",
}


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
@pytest.mark.parametrize("fault", SENTENCES)
def test_it_is_named_and_the_run_goes_on_when_it_is_started_again(tmp_path, launcher, fault):
    run = tmp_path / "run"
    flags = ["--train-iters", "5", "--save", str(run), "--load", str(run), "--save-interval", "2"]
    words = command(launcher, 2, "finetune", [*flags, "--metrics-file", str(tmp_path / "metrics.jsonl")])
    ended = run_to_end(words, tmp_path / "log", HAPLOVL_FAULT=f"{fault}@4:1")
    assert last_words(run)["code"] == 70, ended.output[-3000:]
    assert SENTENCES[fault] in last_words(run)["sentence"]
    # DeepSpeed hands on the code of the process that it sees end first, torchrun makes 1 of each.
    assert ended.code == (70 if (launcher, fault) == ("deepspeed", "unknown_error") else ended.code) != 0
    if launcher == "torchrun":
        assert f"traceback : {last_words(run)['sentence']}" in ended.output
    ends_as_undisturbed(words, tmp_path)
