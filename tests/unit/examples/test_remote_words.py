"""Words of a launch by ssh arrive on the other machine as they were given, by DeepSpeed's own runner and a shell."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
PLAIN = ["finetune_haplovl.py", "--save", "runs/a", "--lr", "1e-3", "--data-path", "0.5", "a", "0.5", "b"]
AWKWARD = [
    *("runs/a;touch x", "runs/a;touch${IFS}x", "$(touch x)", "`touch x`", "a b;touch x", 'a "b" c', '"', "'", "a'b c"),
    *("a|b", "a&b", "a>b", "a<b", "*.py", "?", "[a-z]*", "~", "#a", "!", "{a,b}", "(a)", "\\", "a\\b c", "\\$ `x`"),
    *("", " ", "a\nb", "a\tb", "$HOME", "$HOME b", "--allow-missing=.*", "ü ö", "ü", "\\\\ ' \" $(touch x)", 'a\\" b'),
]


def prepared(folder: Path, hosts: int, words: list[str], **variables: str) -> subprocess.CompletedProcess[bytes]:
    hostfile = folder / "host file"
    hostfile.write_text("# the machines\n\n" + "".join(f"node{i} slots=8\n" for i in range(hosts)))
    script = 'set -euo pipefail; source "$0"; remote_words "$@"; printf "%s\\0" "${REMOTE_WORDS[@]}"'
    words = ["bash", "-c", script, str(REPOSITORY / "examples/common/remote_words.sh"), str(hostfile), *words]
    cwd = variables.pop("cwd", "/tmp")
    return subprocess.run(words, capture_output=True, cwd=cwd, env={"PATH": "/usr/bin:/bin", **variables})


def arrived(folder: Path, words: list[str]) -> list[str]:
    """What a program on the other machine gets."""
    from deepspeed.launcher.multinode_runner import PDSHRunner

    runner = PDSHRunner(argparse.Namespace(user_args=words, user_script="-"), "")
    # pdsh joins its words with blanks and hands them to ssh, which hands them to a shell.
    command = " ".join(["printf", r"'%s\0'", *runner.user_arguments])
    output = subprocess.run(["sh", "-c", command], capture_output=True, cwd=folder, check=True).stdout
    return output.decode().split("\0")[:-1]


@pytest.mark.parametrize("words", [PLAIN, AWKWARD, *([word, "end"] for word in AWKWARD)], ids=repr)
def test_they_arrive(tmp_path: Path, words: list[str]) -> None:
    found = prepared(tmp_path, 2, words)
    assert found.returncode == 0, found.stderr
    (tmp_path / "there").mkdir()
    assert arrived(tmp_path / "there", found.stdout.decode().split("\0")[:-1]) == words
    assert not list((tmp_path / "there").iterdir())


def test_unprepared_ones_do_not(tmp_path: Path) -> None:
    """Otherwise nothing would have to be done, and a newer DeepSpeed that quotes would quote twice."""
    arrived(tmp_path, ["runs/a;touch x".replace(" ", "${IFS}"), "end"])
    assert [path.name for path in tmp_path.iterdir()] != []


def test_one_machine_asks_no_shell(tmp_path: Path) -> None:
    found = prepared(tmp_path, 1, AWKWARD)
    assert found.stdout.decode().split("\0")[:-1] == AWKWARD


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        (["--save", "runs/%h"], {}, "pdsh would change %h in 'runs/%h' on every machine"),
        (["--save", "100%% sure"], {}, "pdsh would change %% in"),
        (PLAIN, {"MASTER_ADDR": "node0;touch x"}, "would read 'node0;touch x' in their own way"),
        (PLAIN, {"MASTER_PORT": "$(id)"}, "would read '$(id)' in their own way"),
        (PLAIN, {"cwd": "a folder"}, "a folder' in their own way"),
    ],
)
def test_what_cannot_arrive_is_refused(tmp_path: Path, words, variables, message) -> None:
    if "cwd" in variables:
        variables = {"cwd": str(tmp_path / variables["cwd"])}
        Path(variables["cwd"]).mkdir()
    found = prepared(tmp_path, 2, words, **variables)
    assert found.returncode == 1 and message in found.stderr.decode() and found.stdout == b""
