"""Copies on the machines' own disks, where a machine is a folder and its ranks are processes joined by gloo."""

from __future__ import annotations

import multiprocessing
import shutil

import pytest
import torch
import torch.distributed as dist

from megatron_haplovl.checkpoint import exchange
from megatron_haplovl.checkpoint.local_copies import local_root, newest_copy, remove_copies
from megatron_haplovl.checkpoint.machines import find_machines
from megatron_haplovl.checkpoint.manifest import MANIFEST, damaged_files
from megatron_haplovl.checkpoint.pieces import WEIGHT, Piece, PieceReader
from megatron_haplovl.checkpoint.state import TrainingState
from megatron_haplovl.checkpoint.write import settings_texts, write_manifest, write_rank, write_settings
from megatron_haplovl.config.schema import Config
from megatron_haplovl.parallel.groups import Group

FORK = multiprocessing.get_context("fork")
RANKS, LENGTH = 4, 1000
SHAPES = {"a": torch.Size((RANKS * LENGTH,))}
VALUES = torch.arange(float(RANKS * LENGTH))


def machine(root, rank, ranks_of_machine=2):
    return root / f"machine{rank // ranks_of_machine}"


def write_copy(root, step, run_id="a run"):
    """What four ranks on two machines leave there."""
    texts = settings_texts(Config(), TrainingState(step, 4, "a plan", run_id))
    records = []
    for rank in range(RANKS):
        folder = machine(root, rank) / f"global_step{step}"
        folder.mkdir(parents=True, exist_ok=True)
        piece = Piece("a", WEIGHT, None, 0, 1, rank * LENGTH, LENGTH)
        record = write_rank(folder, rank, [(piece, VALUES[rank * LENGTH : (rank + 1) * LENGTH] + step)], run_id)
        del record["run_id"]
        (folder / f"rank-{rank:05d}.json").unlink()
        records.append(record)
    for folder in root.glob(f"machine*/global_step{step}"):
        write_settings(folder, *texts)
        write_manifest(folder, records, SHAPES, torch.float32, run_id)


def run_ranks(root, ranks, function, *words):
    """What each of some processes returns."""

    def start(rank, results):
        dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=ranks)
        control = Group(rank, ranks, tuple(range(ranks)), dist.group.WORLD)
        results.put((rank, function(root, control, *words)))
        results.close()
        results.join_thread()
        dist.destroy_process_group()

    results = FORK.Queue()
    processes = [FORK.Process(target=start, args=(rank, results), daemon=True) for rank in range(ranks)]
    for process in processes:
        process.start()
    answers = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
    return [answers[rank] for rank in range(ranks)]


def restart(root, control, ranks_of_machine, newer_than):
    """A run that starts on these machines, and what it can read where it is."""
    exchange._CHUNK = 1500  # several messages for a file
    folder = machine(root, control.rank, ranks_of_machine)
    machines = find_machines(folder, control, "new")
    found = newest_copy(folder, machines, control, newer_than)
    if found is None:
        return None, machines.leads
    assert damaged_files(found) == []
    return found.name, machines.leads, PieceReader(found).get("a").tolist()


@pytest.mark.parametrize(
    ("ranks", "ranks_of_machine"),
    [(4, 2), (2, 1), (3, 1), (4, 4)],
    ids=["as before", "one rank each", "a third machine", "only one machine is left"],
)
def test_what_a_machine_lacks_is_sent(tmp_path, ranks, ranks_of_machine):
    write_copy(tmp_path, 10)
    write_copy(tmp_path, 20)
    answers = run_ranks(tmp_path, ranks, restart, ranks_of_machine, 5)
    leads = tuple(range(0, ranks, ranks_of_machine))
    if len(leads) == 1:
        assert answers == [(None, leads)] * ranks
    else:
        assert answers == [("global_step20", leads, (VALUES + 20).tolist())] * ranks
    assert list(tmp_path.glob("machine*/**/unfinished-*")) == list(tmp_path.glob("machine*/.rank-*")) == []


def remove(folder):
    shutil.rmtree(folder)


def flip(folder):
    path = sorted(folder.glob("rank-*.safetensors"))[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [remove, flip, lambda folder: (folder / MANIFEST).unlink()])
def test_a_copy_that_is_not_whole_gives_way_to_the_one_before(tmp_path, damage):
    write_copy(tmp_path, 10)
    write_copy(tmp_path, 20)
    damage(tmp_path / "machine1" / "global_step20")
    answers = run_ranks(tmp_path, 2, restart, 1, 5)
    assert answers == [("global_step10", (0, 1), (VALUES + 10).tolist())] * 2
    assert run_ranks(tmp_path / "machine0", 1, restart, 1, 30) == [(None, (0,))]


def test_copies_of_two_runs_are_not_mixed(tmp_path):
    write_copy(tmp_path, 20)
    write_copy(tmp_path / "other", 20, "another run")
    shutil.rmtree(tmp_path / "machine1" / "global_step20")
    shutil.copytree(tmp_path / "other" / "machine1" / "global_step20", tmp_path / "machine1" / "global_step20")
    assert run_ranks(tmp_path, 2, restart, 1, 5) == [(None, (0, 1))] * 2


def test_a_copy_that_is_not_newer_is_not_used(tmp_path):
    write_copy(tmp_path, 20)
    assert run_ranks(tmp_path, 2, restart, 1, 20) == [(None, (0, 1))] * 2


def test_the_sentence_about_a_copy_that_is_not_whole(tmp_path, log_lines):
    write_copy(tmp_path, 20)
    root = tmp_path / "machine0"
    assert newest_copy(root, find_machines(root, Group(), "new"), Group(), 5) is None
    assert any(
        f"the local copy {root}/global_step20 is not used: rank-00002.safetensors is whole on none of the 1 machines "
        "(2 of 7 files are not)" in line
        for line in log_lines
    )


def test_only_one_is_kept(tmp_path):
    write_copy(tmp_path, 10)
    write_copy(tmp_path, 20)
    root = tmp_path / "machine0"
    (root / ".global_step30.unfinished").mkdir()
    remove_copies(root, root / "global_step20")
    assert [path.name for path in root.iterdir()] == ["global_step20"]


def test_runs_that_share_a_disk_have_folders_of_their_own(tmp_path):
    one, two = (local_root(str(tmp_path), str(tmp_path / name / "run")) for name in ("a", "b"))
    assert one != two and one.name.startswith("run-") and one.parent == tmp_path


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--non-persistent-local-ckpt-dir: nothing can be written to"):
        find_machines(tmp_path / "file", Group(), "new")
