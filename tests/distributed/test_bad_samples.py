"""Runs that skip samples, in every kind of layout, against one process that never had their documents.

The reference computes each document alone. It leaves out those that it cannot read, and divides by the tokens that it
has seen itself. Planted once to see it fail: the plan's own counts, gaps counted once per tensor-parallel rank, gaps of
the first pipeline stage only.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import pytest

from megatron_haplovl.data.dataset import lay_out_document
from megatron_haplovl.data.loader import build_loader
from megatron_haplovl.data.mixture_sources import open_run_sources
from megatron_haplovl.data.sources import IndexedSource
from megatron_haplovl.training.initial_weights import fill_weights
from megatron_haplovl.training.model_setup import build_model
from tests.distributed.cases import PARALLEL_RANKS, STEPS, parallel_case
from tests.distributed.launch import run_ranks
from tests.distributed.reference import ONE_RANK
from tests.distributed.sources import add_document, logged, make_sources, sources_config

CASES = (
    ("distill", "DP 4, ZeRO 0"),
    ("distill", "TP 2 + SP x PP 2, ZeRO 1"),
    ("distill", "samples CP 2 x DP 2, ZeRO 3"),
    ("full", "TP 4 + SP, ZeRO 3"),
    ("full", "CP 4, ZeRO 1"),
    ("full", "CP 2 x PP 2, ZeRO 1, micro-batch 2"),
    ("full", "PP 4, ZeRO 1"),
    ("full", "samples PP 2 x DP 2, ZeRO 1"),
)
SKIP = 40
# As in `test_sources.py`, whose arithmetic this is.
TOLERANCE = 2e-6


def damage(prefix: str) -> None:
    """Overwrite the end of an image, which many samples share, and an entry of a loss mask."""
    for part, number in (("_images", 0), ("_loss_mask", 2)):
        path, source = Path(f"{prefix}{part}.bin"), IndexedSource(prefix)
        dataset = {"_images": source._images, "_loss_mask": source._loss_mask}[part]
        content, end = bytearray(path.read_bytes()), int((dataset.starts() + dataset.lengths)[number])
        length = 60 if part == "_images" else 1
        content[end - length : end] = bytes([7]) * length
        path.write_bytes(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_spm_model):
    """All layouts, one after the other."""
    folder = tmp_path_factory.mktemp("damaged")
    make_sources(folder, tiny_spm_model)
    for name in ("a", "b", "aux"):
        damage(f"{folder}/{name}")
    for case in CASES:
        run_ranks("worker_sources.py", PARALLEL_RANKS, str(folder), str(SKIP), parallel_case(*case))
    return folder


def is_readable(source, sample: int, vision) -> bool:
    try:
        lay_out_document([source.read(sample)], vision)
    except ValueError:
        return False
    return True


def reference(folder: Path, recipe: str, unit: str):
    """What the log must say of training by source, of its last step, and of the validation; and the samples skipped."""
    c = sources_config(parallel_case(recipe, f"{unit}DP 4, ZeRO 0"), folder)
    sources = open_run_sources(c)
    whole = build_model(c, ONE_RANK)
    fill_weights(whole, c)
    found, bad = [], set()
    for shares, steps, shuffle in (((sources.train, sources.aux), STEPS, True), ((sources.valid, []), 1, False)):
        loader = build_loader((), c, num_steps=steps, dp_rank=0, dp_size=1, shares=shares, shuffle=shuffle)
        opened = [share.source for group in shares for share in group]
        sums, tokens = defaultdict[str, float](float), Counter[str]()
        last = {}
        for step in range(steps):
            before, before_tokens = dict(sums), Counter(tokens)
            for pack in loader._plan.packs_of(step):
                for items in loader.plan.documents(pack):
                    unreadable = {
                        (opened[source].name, sample)
                        for source, sample in items
                        if not is_readable(opened[source], sample, c.model.vision)
                    }
                    bad |= unreadable
                    if not unreadable:
                        add_document(whole.module, c, items, opened, sums, tokens)
            totals, numbers = defaultdict[str, float](float), Counter[str]()
            for name in sums:
                totals[name.partition("/")[0]] += sums[name] - before.get(name, 0.0)
                numbers[name.partition("/")[0]] += tokens[name] - before_tokens[name]
            last = {term: totals[term] / numbers[term] for term in totals}
        by_source = {name: sums[name] / tokens[name] if sums[name] else float(tokens[name]) for name in tokens}
        found.append((by_source, last))
    return *found, bad


@pytest.fixture(scope="module")
def serial(folder):
    units = {(recipe, "samples " if layout.startswith("samples ") else "") for recipe, layout in CASES}
    return {(recipe, unit): reference(folder, recipe, unit) for recipe, unit in units}


@pytest.mark.parametrize(("recipe", "layout"), CASES)
def test_as_if_the_plan_had_never_had_them(folder, serial, recipe, layout):
    train, valid = logged(folder, recipe, layout)
    (by_source, last), (valid_by_source, valid_last), bad = serial[recipe, "samples " * layout.startswith("samples ")]
    assert {name: value for name, value in train.items() if "/" in name} == pytest.approx(by_source, rel=TOLERANCE)
    assert {name: train[name] for name in last} == pytest.approx(last, rel=TOLERANCE)
    losses = {f"valid {n}": v for n, v in (valid_by_source | valid_last).items() if not n.startswith("consumed")}
    assert {name: valid[name] for name in losses} == pytest.approx(losses, rel=TOLERANCE)
    assert train["number of skipped samples"] == len(bad) > 3
    # Two steps of a few samples each do not meet a bad one of every source.
    wanted = {"a"} if layout.startswith("samples ") else {"a", "b", "aux"} if recipe == "distill" else {"a", "b"}
    assert {Path(prefix).name for prefix, _ in bad} >= wanted
