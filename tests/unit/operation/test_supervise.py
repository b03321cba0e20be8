"""A check of ours ends a run with its sentence and code 1; any other error keeps its traceback."""

import pytest
import torch

from megatron_haplovl.config.allowed import Allowed
from megatron_haplovl.config.schema import Config
from megatron_haplovl.operation.endings import Ending, ExitCode, RunEnd
from megatron_haplovl.operation.supervise import finish, supervised


def ends_with(action, capsys):
    with pytest.raises(SystemExit) as end, supervised(Config()):
        action()
    return end.value.code, capsys.readouterr().err


def test_our_refusals_are_sentences(capsys):
    code, words = ends_with(lambda: Allowed(missing=("(",)), capsys)
    assert code == 1
    assert words.startswith("error: --allow-missing (: not a regular expression")
    assert "Traceback" not in words


def test_other_errors_keep_their_traceback(capsys):
    def elsewhere():
        raise ValueError("elsewhere")

    for action, words in (
        (elsewhere, "ValueError: elsewhere"),
        (lambda: torch.optim.AdamW([torch.zeros(1)], lr=-1.0), "Invalid learning rate"),
        (lambda: 1 / 0, "ZeroDivisionError"),
    ):
        code, printed = ends_with(action, capsys)
        assert code == 70
        assert "Traceback" in printed
        assert words in printed.splitlines()[-1]


def test_the_codes(capsys):
    def end():
        raise RunEnd(ExitCode.COME_BACK, "left after step 3", cause="leaving", step=3)

    assert ends_with(end, capsys) == (75, "left after step 3\n")
    finish(Ending(ExitCode.DONE, "done", "done"))
    assert [int(code) for code in ExitCode] == [0, 1, 70, 75]
