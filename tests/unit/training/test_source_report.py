"""What is reported of each source."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from megatron_haplovl.config.schema import Config, DataConfig, ModelConfig, ScheduleConfig
from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data.loader import build_loader
from megatron_haplovl.data.mixture_sources import open_run_sources
from megatron_haplovl.data.source_labels import source_labels
from megatron_haplovl.losses.by_source import by_source
from megatron_haplovl.losses.terms import LANGUAGE_MODELING_TERMS
from megatron_haplovl.parallel.groups import Group
from megatron_haplovl.training.source_report import SourceLosses, consumed_columns, describe_sources


def counts(*lm_tokens: int) -> np.ndarray:
    """Of one sample of each source."""
    return np.array([[1, n, 2 * n, 0] for n in lm_tokens])


def test_a_window_is_one_mean_over_its_tokens() -> None:
    losses = SourceLosses(("a", "b", "c"), LANGUAGE_MODELING_TERMS, torch.device("cpu"))
    key = by_source("lm loss")
    losses.add({key: torch.tensor([6.0, 0.0, 0.0])}, counts(2, 0, 0))
    losses.add({key: torch.tensor([1.0, 5.0, 0.0])}, counts(5, 4, 0))
    # A rank whose pipeline stage has no head.
    losses.add({}, counts(0, 0, 0))
    assert losses.columns(Group()) == {"lm loss/a": 1.0, "lm loss/b": 1.25}
    assert losses.columns(Group()) == {"lm loss/a": 1.0, "lm loss/b": 1.25}
    losses.clear()
    losses.add({key: torch.tensor([0.0, 0.0, 3.0])}, counts(0, 0, 1))
    assert losses.columns(Group()) == {"lm loss/c": 3.0}


def test_a_long_window_keeps_its_small_parts() -> None:
    losses = SourceLosses(("a", "b"), LANGUAGE_MODELING_TERMS, torch.device("cpu"))
    for _ in range(3):
        losses.add({by_source("lm loss"): torch.tensor([2.0**24, 1.0])}, counts(2**24, 1))
        losses.add({by_source("lm loss"): torch.tensor([1.0, 0.0])}, counts(1, 0))
    assert losses.columns(Group()) == {"lm loss/a": 1.0, "lm loss/b": 1.0}


def test_one_source_has_no_columns() -> None:
    losses = SourceLosses(("a",), LANGUAGE_MODELING_TERMS, torch.device("cpu"))
    losses.add({}, counts(3))
    assert losses.columns(Group()) == {} and consumed_columns(("a",), counts(3)) == {}
    assert consumed_columns(("a", "b"), counts(3, 4)) == {"consumed samples/a": 1, "consumed samples/b": 1}


def test_sources_are_described(tiny_prefix, tmp_path) -> None:
    mixture = {
        "train": [{"path": tiny_prefix, "sampling": "first:25%", "epochs": 3}, {"path": tiny_prefix, "name": "x"}]
    }
    mixture["train"][1] |= {"max_tiles": 2}
    (tmp_path / "mix.yaml").write_text(json.dumps(mixture), encoding="utf-8")
    vision = VisionConfig(patch_size=8, image_size=16, image_aspect_ratio="anyres", max_tiles=4, image_newline=True)
    c = Config(
        model=ModelConfig(vocab_size=500, vision=vision),
        data=DataConfig(
            data_config=f"{tmp_path}/mix.yaml", seq_length=160, packing=False, data_cache_path=str(tmp_path)
        ),
        schedule=ScheduleConfig(global_batch_size=42, micro_batch_size=1),
    )
    sources = open_run_sources(c)
    data = build_loader((), c, num_steps=2, dp_rank=0, dp_size=1, shares=(sources.train, []))
    # 42 draws in an epoch: 6 samples three times, and 24 once.
    assert describe_sources(sources.train, data, 2).splitlines() == [
        "sources of 84 samples in 2 steps:",
        "  train: 6 samples of 24, 42.86 % of those read, 6.00 epochs",
        "  x: 24 samples, 57.14 % of those read, 2.00 epochs, max_tiles 2: fewer tiles than an export makes of such "
        "images",
    ]


@pytest.mark.parametrize("labels", [(None, None, None), ("a", "a", "a"), ("a", "a (aux)", "a")])
def test_labels_are_told_apart(tiny_prefix, labels) -> None:
    from megatron_haplovl.data.plan.cache import SourceShare
    from megatron_haplovl.data.sources import IndexedSource

    shares = [SourceShare(IndexedSource(tiny_prefix), label=label) for label in labels]
    names = source_labels(shares[:2], shares[2:])
    assert len(set(names)) == 3 and names[0] == (labels[0] or "train")
