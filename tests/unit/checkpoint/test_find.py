"""Which checkpoint is taken: the newest, a named one, or with a fall-back the newest whole one; damage is found."""

from __future__ import annotations

import json
import re

import pytest
import torch

from megatron_haplovl.checkpoint.find import find_checkpoint, find_resumable
from megatron_haplovl.checkpoint.folders import complete_checkpoints, restore_replaced, unfinished
from megatron_haplovl.checkpoint.manifest import MANIFEST
from megatron_haplovl.checkpoint.pieces import WEIGHT, Piece
from megatron_haplovl.checkpoint.state import TrainingState
from megatron_haplovl.checkpoint.weight_files import write_weights
from megatron_haplovl.checkpoint.write import complete, settings_texts, write_rank, write_settings
from megatron_haplovl.config.schema import Config
from megatron_haplovl.parallel.groups import Group

ONE = Group()


def save(root, step, latest=True):
    folder = root / f"global_step{step}"
    aside = unfinished(folder)
    aside.mkdir(parents=True)
    write_settings(aside, *settings_texts(Config(), TrainingState(step, 4, "a plan", "a run")))
    write_rank(aside, 0, [(Piece("a", WEIGHT, None, 0, 1, 0, 3), torch.arange(3.0))], "a run")
    complete(aside, folder, 1, {"a": torch.Size((3,))}, torch.float32, patience=1.0, run_id="a run")
    if latest:
        (root / "latest").write_text(folder.name)
    return folder


@pytest.fixture
def root(tmp_path):
    for step in (1, 2, 10):
        save(tmp_path, step)
    return tmp_path


@pytest.fixture
def find(log_lines):
    """(path, options) -> (what is found, what is logged meanwhile)."""

    def found(path, **options):
        log_lines.clear()
        return find_resumable(path, ONE, **options), list(log_lines)

    return found


def test_the_newest_or_the_one_that_is_named(find, root):
    assert find(root) == (root / "global_step10", [])
    assert find(root / "global_step2") == (root / "global_step2", [])
    (root / "latest").unlink()
    assert find(root) == (root / "global_step10", [])


def test_there_may_be_none_yet(find, tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        assert find(path) == (None, [])
        with pytest.raises(ValueError, match="there is no checkpoint"):
            find_checkpoint(path, ONE)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage", [truncate, flip, lambda path: path.unlink()], ids=["truncated", "flipped", "missing"]
)
@pytest.mark.parametrize("name", ["rank-00000.safetensors", "config.json", "training_state.json", MANIFEST])
def test_damage_to_any_file_is_found(find, root, name, damage):
    damage(root / "global_step10" / name)
    with pytest.raises(ValueError, match=rf"global_step10 is damaged .*{re.escape(name)}.*or give --allow-fallback"):
        find(root)
    found, log = find(root, allow_fallback=True)
    if (name, damage.__name__) == (MANIFEST, "<lambda>"):
        assert len(log) == 1
    assert found == root / "global_step2"
    assert "global_step10 is damaged" in log[0] and name in log[0]


def test_all_are_damaged(find, root):
    for step in (1, 2, 10):
        flip(root / f"global_step{step}" / "rank-00000.safetensors")
    with pytest.raises(ValueError, match=r"global_step10 is damaged .*global_step10/rank.*and so is every one before"):
        find(root, allow_fallback=True)


def test_a_fallback_does_not_look_at_later_steps(find, root):
    (root / "latest").write_text("global_step2")
    flip(root / "global_step2" / "rank-00000.safetensors")
    assert find(root, allow_fallback=True)[0] == root / "global_step1"
    assert complete_checkpoints(root, up_to=root / "global_step2") == [root / "global_step2", root / "global_step1"]


def test_latest_names_nothing(find, root):
    (root / "latest").write_text("global_step11")
    with pytest.raises(ValueError, match="names the checkpoint 'global_step11'"):
        find(root)
    assert find(root, allow_fallback=True)[0] == root / "global_step10"


def test_killed_between_the_renames_of_a_replacement(find, root):
    """The run had been taken back to an earlier step and came to step 10 again."""
    old = root / "global_step10"
    content = {path.name: path.read_bytes() for path in old.iterdir()}
    aside = unfinished(old)
    old.rename(aside.with_name(f"{aside.name}.replaced"))
    # Whoever only reads there leaves this to the run that writes.
    with pytest.raises(ValueError, match="names the checkpoint|no such"):
        (root / "latest").write_text("global_step10")
        find(root, is_ours=False)
    assert not old.exists()
    assert find(root) == (old, [])
    assert {path.name: path.read_bytes() for path in old.iterdir()} == content
    # After the second rename the old one is not wanted any more.
    left = aside.with_name(f"{aside.name}.replaced")
    left.mkdir()
    restore_replaced(root)
    assert left.is_dir() and {path.name: path.read_bytes() for path in old.iterdir()} == content


def test_a_manifest_of_an_earlier_version(find, root):
    path = root / "global_step10" / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    path.write_text(json.dumps(manifest))
    assert find(root) == (root / "global_step10", [])


def test_weights_alone_are_not_resumed(find, tmp_path):
    folder = tmp_path / "global_step0"
    write_weights({"a": torch.ones(2)}, folder)
    (folder / "config.json").write_text("{}")
    (tmp_path / "latest").write_text("global_step0")
    assert find_checkpoint(tmp_path, ONE) == folder
    with pytest.raises(ValueError, match=r"holds weights only.*--finetune"):
        find(tmp_path)


def test_a_rank_that_does_not_see_the_folder(root):
    class Other(Group):
        """Gives the first rank's answer on a machine that does not have the folder."""

        def gather_objects(self, mine):
            return [[root / "elsewhere" / "global_step3"]] if mine and isinstance(mine[0], type(root)) else [mine]

    with pytest.raises(ValueError, match="rank 0 does not see it; it must be on a file system that all ranks share"):
        find_resumable(root, Other())
