"""A cached plan is used for exactly the inputs it was made from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data.mock_source import MockSource
from megatron_haplovl.data.plan.cache import PlanInputs, SourceShare, cached_plan
from megatron_haplovl.data.plan.epoch import PlanSettings
from megatron_haplovl.data.plan.packs import PackPlan

VISION = VisionConfig(patch_size=8, image_size=16, image_aspect_ratio="pad")
SETTINGS = PlanSettings(seed=1, seq_length=64, packing=True, shuffle=True, skip_long_samples=False)


def make_inputs(seed: int = 0, weight: float = 1.0, vision: VisionConfig = VISION) -> PlanInputs:
    return PlanInputs([SourceShare(MockSource(100, VISION, 64, seed, num_samples=50), weight)], [], vision, SETTINGS)


def other_shares(share: SourceShare) -> list[SourceShare]:
    first = dataclasses.replace(share, selection="first 3", samples=np.arange(3))
    return [dataclasses.replace(share, weight=None, epochs=2.0), first, dataclasses.replace(first, selection="other")]


def load(inputs: PlanInputs, cache: Path, min_packs: int) -> PackPlan:
    return cached_plan(inputs, cache, min_packs=min_packs, is_builder=True, barrier=lambda: None)


def test_key_depends_on_everything() -> None:
    base = make_inputs()
    assert base.key == make_inputs().key
    others = [
        make_inputs(seed=1),
        make_inputs(weight=2.0),
        *(dataclasses.replace(base, main=[share]) for share in other_shares(base.main[0])),
        make_inputs(vision=dataclasses.replace(VISION, image_newline=True)),
        dataclasses.replace(base, main=[], aux=base.main),
        *(
            dataclasses.replace(base, settings=settings)
            for settings in (
                dataclasses.replace(SETTINGS, seed=2),
                dataclasses.replace(SETTINGS, seq_length=65),
                dataclasses.replace(SETTINGS, packing=False),
                dataclasses.replace(SETTINGS, shuffle=False),
                dataclasses.replace(SETTINGS, skip_long_samples=True),
            )
        ),
    ]
    assert len({inputs.key for inputs in [base, *others]}) == 13


def test_epochs_are_built_once_and_as_needed(tmp_path: Path, log_lines: list[str]) -> None:
    inputs = make_inputs()
    one = load(inputs, tmp_path, 1)
    assert len(one.epochs) == len(log_lines) == 1
    log_lines.clear()
    three = load(inputs, tmp_path, 2 * one.num_packs + 5)
    assert len(three.epochs) >= 2 and len(log_lines) == len(three.epochs) - 1
    assert np.array_equal(three.epochs[0].items, one.epochs[0].items)
    log_lines.clear()
    load(inputs, tmp_path, three.num_packs)
    assert log_lines == []


def test_packs_are_numbered_through_the_epochs(tmp_path: Path) -> None:
    plan = load(make_inputs(), tmp_path, 40)
    first, second = plan.epochs[0], plan.epochs[1]
    assert plan.documents(first.num_packs) == second.documents(0)
    assert plan.documents(first.num_packs - 1) == first.documents(first.num_packs - 1)
    assert plan.documents(plan.num_packs) == []
    whole = plan.counts(range(plan.num_packs + 10))
    assert whole.documents == 50 * len(plan.epochs)
    assert PackPlan([first], cycle=True).documents(first.num_packs + 2) == first.documents(2)


def test_two_builders_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second builder keeps what the first one has written."""
    inputs = make_inputs()
    load(inputs, tmp_path, 1)
    folder = next(tmp_path.rglob("epoch_00000"))
    real = Path.is_dir
    missed: list[Path] = []

    def is_dir(path: Path) -> bool:
        if path == folder and not missed:  # as if it had not been there yet
            missed.append(path)
            return False
        return real(path)

    monkeypatch.setattr(Path, "is_dir", is_dir)
    plan = load(inputs, tmp_path, 1)
    assert missed and plan.num_packs > 0
    assert sorted(path.name for path in folder.parent.iterdir()) == ["epoch_00000"]


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written .* see --data-cache-path"):
        load(make_inputs(), tmp_path / "file", 1)
