"""Whatever ends a run becomes one sentence, an exit code, and last words."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_haplovl.config.allowed import Allowed
from megatron_haplovl.config.cli import RefusedCommandLine, parse_args
from megatron_haplovl.config.schema import CheckpointConfig, Config
from megatron_haplovl.operation.endings import Ending, ExitCode, RunEnd
from megatron_haplovl.operation.lost_peers import is_lost_peer
from megatron_haplovl.operation.supervise import parsed, supervised
from megatron_haplovl.parallel import launch


@pytest.fixture
def save(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path / "save"


def run(save, action, steps=0):
    """The exit status, and the last words, of a run that does this."""
    status: Any = 0
    try:
        with supervised(Config(checkpoint=CheckpointConfig(save=save and str(save)))) as operation:
            if steps:
                operation.clock.start_step(steps + 1)
            operation.ending = action()
    except SystemExit as end:
        status = end.code
    return status, json.loads(((save or Path(os.environ["HAPLOVL_LAUNCH_DIR"])) / "last_words.json").read_text())


def fail(error):
    raise error


def test_a_start_knows_how_the_one_before_ended(save):
    settings, began = Config(checkpoint=CheckpointConfig(save=str(save))), time.time()
    with supervised(settings) as operation:
        assert operation.ending_before(0.0) is None
    run(save, lambda: Ending(ExitCode.DONE, "all done", cause="done"))
    with supervised(settings) as operation:
        assert operation.ending_before(began) == "all done"
        # Another start has begun since, and has said nothing.
        assert operation.ending_before(time.time()) is None


def test_our_refusals_are_sentences(save, capsys):
    status, words = run(save, lambda: Allowed(missing=("(",)))
    printed = capsys.readouterr().err
    assert (status, words["code"], words["cause"]) == (1, 1, "ValueError")
    assert printed.startswith("error: --allow-missing (: not a regular expression")
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (lambda: fail(ValueError("elsewhere")), "ValueError: elsewhere"),
        (lambda: torch.optim.AdamW([torch.zeros(1)], lr=-1.0), "Invalid learning rate"),
        (lambda: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_other_errors_keep_their_traceback(save, capsys, action, words):
    status, kept = run(save, action)
    printed = capsys.readouterr().err
    assert (status, kept["code"]) == (70, 70)
    assert "Traceback" in printed
    assert words in printed.splitlines()[-1]


@pytest.mark.parametrize(
    ("action", "code", "printed"),
    [
        (lambda: Ending(ExitCode.DONE, "all 3 steps are done", "done", 3), 0, "all 3 steps are done\n"),
        (lambda: fail(RunEnd(ExitCode.NEEDS_PERSON, "no", cause="x")), 1, "error: no\n"),
        (lambda: fail(RunEnd(ExitCode.MACHINE_FAULT, "gone", cause="x")), 70, "error: gone\n"),
        (lambda: Ending(ExitCode.COME_BACK, "left after step 3", "leaving", 3), 75, "left after step 3\n"),
    ],
)
def test_every_end_has_a_code_a_sentence_and_last_words(save, capsys, action, code, printed):
    status, words = run(save, action)
    assert (status, words["code"], words["previous"]) == (code, code, None)
    assert capsys.readouterr().err == printed
    assert words["host"] == os.uname().nodename


def test_the_same_step_and_cause_twice_need_a_person(save, capsys):
    def gone():
        fail(RunEnd(ExitCode.MACHINE_FAULT, "gone", cause="x"))

    assert [run(save, gone, steps)[0] for steps in (3, 4, 4, 4)] == [70, 70, 1, 1]
    assert "gone (the second time in a row after 4 steps" in capsys.readouterr().err
    assert run(save, lambda: fail(RuntimeError("another")), 4)[0] == 70
    assert run(save, gone, 4)[1]["previous"] == {"code": 70, "step": 4, "cause": "RuntimeError"}
    assert run(save, lambda: Ending(ExitCode.COME_BACK, "left", "leaving", 5))[0] == 75
    assert run(save, lambda: Ending(ExitCode.COME_BACK, "left", "leaving", 5))[0] == 75


def test_a_launch_script_gets_the_code_and_its_launcher_does_not(save, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "launch"
    folder.mkdir()
    monkeypatch.setenv("HAPLOVL_LAUNCH_DIR", str(folder))
    for code, status in ((1, 0), (70, 70), (75, 0), (0, 0)):
        (folder / "last_words.json").unlink(missing_ok=True)
        (save / "last_words.json").unlink(missing_ok=True)
        assert run(save, lambda code=code: fail(RunEnd(ExitCode(code), "so", cause="x")))[0] == status
        assert (folder / "ending").read_text() == f"{code}\nso\n"
    assert (folder / "begun").exists()


def test_a_refused_command_line_is_not_started_again(save, tmp_path, monkeypatch, capsys):
    def parse():
        return parse_args("finetune", argv=["--model", "haplovl-debug", "--mock-data", "--no-such-flag"])

    with pytest.raises(RefusedCommandLine) as refused:
        parsed(parse)
    assert refused.value.code == 2
    monkeypatch.setenv("HAPLOVL_LAUNCH_DIR", str(tmp_path / "launch"))
    with pytest.raises(SystemExit) as end:
        parsed(parse)
    assert end.value.code == 0
    assert (tmp_path / "launch" / "ending").read_text() == "1\nunrecognized arguments: --no-such-flag\n"


@pytest.mark.parametrize("scripted", [True, False])
@pytest.mark.parametrize("form", ["two words", "one word"])
def test_a_refused_command_line_leaves_its_words_in_the_folder(save, tmp_path, monkeypatch, capsys, scripted, form):
    words = ["--save", str(save)] if form == "two words" else [f"--save={save}"]
    monkeypatch.setattr("sys.argv", ["finetune_haplovl.py", *words, "--no-such-flag"])
    if scripted:
        monkeypatch.setenv("HAPLOVL_LAUNCH_DIR", str(tmp_path / "launch"))
    with pytest.raises(SystemExit) as end:
        parsed(lambda: parse_args("finetune", argv=["--model", "haplovl-debug", "--mock-data", "--no-such-flag"]))
    assert end.value.code == (0 if scripted else 2)
    kept = json.loads((save / "last_words.json").read_text())
    assert (kept["code"], kept["sentence"]) == (1, "unrecognized arguments: --no-such-flag")


def test_without_a_folder_the_launch_remembers(tmp_path, monkeypatch, capsys):
    """The same fault at the same step, in the second start of one launch."""
    monkeypatch.setenv("HAPLOVL_LAUNCH_DIR", str(tmp_path / "launch"))

    def gone():
        fail(RunEnd(ExitCode.MACHINE_FAULT, "gone", cause="x"))

    start_again(monkeypatch, 0)
    assert run(None, gone, 3)[0] == 70
    start_again(monkeypatch, 1)
    assert run(None, gone, 3)[0] == 0  # The script knows that a person is needed.
    assert (tmp_path / "launch" / "ending").read_text().startswith("1\ngone (the second time in a row after 3 steps")


def start_again(monkeypatch, restart):
    """As torchrun does: the same launcher, another process."""
    now = time.time()
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restart))
    monkeypatch.setattr(launch, "_started", lambda pid: now if pid == os.getpid() else now - 100)


@pytest.mark.parametrize("code", [0, 1, 70, 75])
def test_a_restart_behind_a_final_ending_ends_in_the_same_way(save, monkeypatch, capsys, code):
    run(save, lambda: fail(RunEnd(ExitCode(code), "so it was", cause="x")))
    started = []
    start_again(monkeypatch, 1)
    status, _ = run(save, lambda: started.append(1))
    assert (status, started) == ((code, []) if code in (1, 75) else (0, [1]))


def test_ranks_that_left_for_a_machine_that_joins_go_on(save, monkeypatch, capsys):
    """The launcher ends them with SIGTERM, starts them again, and does not count that as a restart."""
    start_again(monkeypatch, 0)
    assert run(save, lambda: Ending(ExitCode.COME_BACK, "left", "leaving", 3))[0] == 75
    start_again(monkeypatch, 0)
    status, words = run(save, lambda: Ending(ExitCode.DONE, "done", "done", 6))
    assert (status, words["sentence"], words["previous"]["code"]) == (0, "done", 75)


def test_the_first_cause_wins_over_those_who_only_lost_a_peer(save, monkeypatch, capsys):
    start_again(monkeypatch, 0)
    monkeypatch.setattr("megatron_haplovl.operation.lost_peers._SECONDS_TO_WAIT", 0.2)
    lost = RuntimeError("[/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:7")
    assert is_lost_peer(lost)
    status, words = run(save, lambda: fail(lost))
    assert (status, words["cause"]) == (70, "lost a peer")
    status, words = run(save, lambda: fail(RunEnd(ExitCode.NEEDS_PERSON, "the cause", cause="x")))
    assert (status, words["sentence"]) == (1, "the cause")
    capsys.readouterr()
    # Later ranks of the same start end like the first, in silence.
    for error in (lost, RunEnd(ExitCode.MACHINE_FAULT, "another", cause="y")):
        status, words = run(save, lambda error=error: fail(error))
        assert (status, words["sentence"]) == (1, "the cause")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "error",
    [
        torch.distributed.DistBackendError("NCCL error"),
        torch.distributed.DistStoreError("wait timeout"),
        torch.distributed.DistNetworkError("reset"),
        RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 60000ms for recv operation"),
        RuntimeError("Connection reset by peer"),
    ],
)
def test_lost_peers_are_recognised(error):
    assert is_lost_peer(error)
    assert not is_lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_lost_peer(ValueError("closed by peer"))


def test_out_of_memory_says_what_to_change(save, capsys):
    status, words = run(save, lambda: torch.empty(1 << 50))
    assert (status, words["cause"]) == (1, "out of memory")
    assert "can't allocate memory" in words["sentence"]
    assert "change, cheapest first: (1) --recompute-granularity selective" in words["sentence"]


def test_torchrun_is_told_the_sentence(save, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    run(save, lambda: fail(RunEnd(ExitCode.NEEDS_PERSON, "do this", cause="x")))
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(tmp_path / "error.json"))
    assert "traceback : do this" in str(ChildFailedError("train", {0: failure}))


def test_a_folder_that_cannot_be_written_does_not_change_the_end(tmp_path, capsys):
    save = tmp_path / "file"
    save.write_text("")
    with pytest.raises(SystemExit) as end, supervised(Config(checkpoint=CheckpointConfig(save=str(save)))):
        fail(RunEnd(ExitCode.COME_BACK, "left", cause="x"))
    assert end.value.code == 75
    assert "cannot be written, the run ends all the same" in capsys.readouterr().err
