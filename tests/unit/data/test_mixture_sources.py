"""The sources of a run: shares, sides of the split, tile rules, and what the batches hold of each.

Planted once to see it fail: the split of main sources only, the rule of tiles not in the plan's hash, a rule that
allows more, samples of joined documents under one source, the counts of items in another order.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_haplovl.commands.preprocess import main
from megatron_haplovl.config.schema import Config, DataConfig, ModelConfig, RecipeConfig, ScheduleConfig
from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data.batch import IGNORE_INDEX
from megatron_haplovl.data.loader import BatchLoader, build_loader
from megatron_haplovl.data.mixture_sources import RunSources, open_run_sources, training_prefixes
from megatron_haplovl.data.plan.cache import PlanInputs, SourceShare
from megatron_haplovl.data.plan.epoch import PlanSettings, build_epoch
from megatron_haplovl.data.source_counts import SOURCE_COUNT_NAMES
from megatron_haplovl.data.sources import IndexedSource
from tests.conftest import make_llava_dataset

PLAN = PlanSettings(seed=0, seq_length=200, packing=True, shuffle=True, skip_long_samples=False)
VISION = VisionConfig(patch_size=8, image_size=16, image_aspect_ratio="anyres", max_tiles=4, image_newline=True)


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory, tiny_spm_model: Path) -> Path:
    """A folder with the prefixes `a`, `b` (half of `a`, backwards) and `c` (the last quarter of `a`, twice)."""
    folder = tmp_path_factory.mktemp("mixture")
    dataset = make_llava_dataset(folder, num_records=40)
    parts = {"a": dataset.records, "b": dataset.records[19::-1], "c": dataset.records[30:] * 2}
    for name, records in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
    sources = [{"path": f"{folder}/{name}", "input": f"{folder}/{name}.json"} for name in parts]
    (folder / "make.yaml").write_text(json.dumps({"train": sources}), encoding="utf-8")
    words = ["--data-config", str(folder / "make.yaml"), "--image-folder", str(dataset.image_folder), "--workers=1"]
    assert main([*words, "--tokenizer-model", str(tiny_spm_model), "--chat-template", "llama3"]) == 0
    return folder


def config(folder: Path, mixture: dict[str, Any] | None, recipe: str = "distill", **data: Any) -> Config:
    settings: dict[str, Any] = {"seq_length": 200, "num_workers": 0, "data_cache_path": str(folder / "cache"), **data}
    if mixture is not None:
        file = folder / "mix.yaml"
        file.write_text(json.dumps(mixture), encoding="utf-8")
        settings |= {"data_config": str(file), "data_var": (f"DATA={folder}",)}
    return Config(
        model=ModelConfig(vocab_size=500, vision=VISION),
        data=DataConfig(**settings),
        schedule=ScheduleConfig(global_batch_size=4, micro_batch_size=2),
        recipe=RecipeConfig(recipe=recipe),
    )


def source(path: str, **keys: Any) -> dict[str, Any]:
    return {"path": f"${{DATA}}/{path}", **keys}


def loader(c: Config, sources: RunSources, steps: int = 12, **options: Any) -> BatchLoader:
    shares = (sources.train, sources.aux)
    return build_loader((), c, num_steps=steps, dp_rank=0, dp_size=1, shares=shares, **options)


def plan_inputs(c: Config, sources: RunSources) -> PlanInputs:
    return PlanInputs(sources.train, sources.aux, c.model.vision, PLAN)


def hashes(share: SourceShare) -> np.ndarray:
    assert isinstance(share.source, IndexedSource)
    return share.source.hashes()


def numbers(shares: list[Any]) -> list[list[int]]:
    return [list(range(s.source.num_samples)) if s.samples is None else s.samples.tolist() for s in shares]


def test_shares_of_a_mixture(prefixes: Path) -> None:
    mixture = {
        "train": [source("a", sampling="first:25%", epochs=2), source("b")],
        "aux": [source("c", sampling="end:5"), source("a", name="all")],
        "valid": [source("b", sampling="first:3")],
    }
    c = config(prefixes, mixture)
    sources = open_run_sources(c)
    assert [(s.weight, s.epochs) for s in sources.train] == [(None, 2.0), (None, 1.0)]
    # What auxiliary sources have no weights for, is their size.
    assert [(s.weight, s.epochs) for s in sources.aux] == [(5.0, None), (40.0, None)]
    assert numbers(sources.train) == [list(range(10)), list(range(20))]
    assert numbers(sources.aux) == [list(range(15, 20)), list(range(40))]
    assert numbers(sources.valid) == [[0, 1, 2]]
    assert training_prefixes(c) == [f"{prefixes}/a", f"{prefixes}/b"]
    data = loader(c, sources)
    assert data.source_names == ("a", "b", "c", "all")
    # Ten samples twice and twenty once; as many auxiliary ones, 5 to 40, of which some are too long to be joined.
    drawn = np.bincount(build_epoch(*plan_inputs(c, sources).blend(), PLAN, 0).items[:, 0])
    assert drawn[:2].tolist() == [20, 20] and drawn[2] <= 5 and 20 < drawn[3] <= 36
    assert len(numbers(open_run_sources(config(prefixes, {"train": [source("a", cap=3)]})).train)[0]) == 3


def test_no_record_is_on_both_sides_in_any_source(prefixes: Path) -> None:
    mixture = {"split": "70,30", "train": [source("a"), source("b", sampling="random:90%")], "aux": [source("c")]}
    sources = open_run_sources(config(prefixes, mixture))
    trained, held_out = set[int](), set[int]()
    for shares, found in ((sources.train + sources.aux, trained), (sources.valid, held_out)):
        for share, chosen in zip(shares, numbers(shares), strict=True):
            found.update(hashes(share)[chosen].tolist())
    assert trained and held_out and not trained & held_out
    # `a` holds all records, so together the sides hold all.
    assert trained | held_out == set(hashes(sources.train[0]).tolist())
    # In `c` every record is there twice, and both are on one side.
    (of_c,) = numbers(sources.aux)
    assert sorted(number % 10 for number in of_c) == sorted([number for number in of_c if number < 10] * 2)
    # The flag wins over the file.
    more = open_run_sources(config(prefixes, mixture, split="50,50"))
    assert len(numbers(more.valid)[0]) > len(numbers(sources.valid)[0])


def test_a_split_of_data_paths(prefixes: Path) -> None:
    whole = open_run_sources(config(prefixes, None, data_path=(f"{prefixes}/a",)))
    assert whole.train[0].samples is None and whole.train[0].weight == 1.0 and not whole.valid
    split = open_run_sources(config(prefixes, None, data_path=(f"{prefixes}/a",), split="70,30"))
    assert sorted(numbers(split.train)[0] + numbers(split.valid)[0]) == list(range(40))


@pytest.mark.parametrize("format_version", [1, 2])
def test_hashes_of_either_format(prefixes: Path, tmp_path: Path, format_version: int) -> None:
    opened = IndexedSource(f"{prefixes}/a")
    expected = np.load(f"{prefixes}/a_sample_hashes.npy")
    opened.manifest = dataclasses.replace(opened.manifest, format_version=format_version)
    assert np.array_equal(opened.hashes(), expected) and opened.hashes().dtype == np.uint64


@pytest.mark.parametrize(
    ("mixture", "recipe", "message"),
    [
        ({"train": [source("a")], "aux": [source("c")]}, "full", "aux is joined with train in stage 1"),
        ({"train": [source("a", max_tiles=5)]}, "distill", "max_tiles 5 would give each of 1 images .* up to 5 tiles"),
        (
            {"train": [source("a", image_token_budget=16)]},
            "distill",
            "image_token_budget 16 would give each of 2 images of a sample up to 2 tiles, the model's own rule 1",
        ),
        ({"split": "1,9999999", "train": [source("a")]}, "distill", "a: the split leaves none of its samples"),
        ({"split": "9999999,1", "train": [source("a")]}, "distill", "the split holds no sample of .*a out"),
        ({"train": [{"path": "${ELSEWHERE}/a"}]}, "distill", r"mix.yaml, line 1: \$\{ELSEWHERE\}"),
    ],
)
def test_what_does_not_fit_is_refused(prefixes: Path, mixture: dict[str, Any], recipe: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_run_sources(config(prefixes, mixture, recipe))


def test_a_tile_rule_is_followed_and_is_part_of_the_plan(prefixes: Path) -> None:
    found = {}
    for tiles in (None, 1):
        rule = {} if tiles is None else {"max_tiles": tiles}
        c = config(prefixes, {"train": [source("a", **rule), source("b")]}, packing=False)
        data = loader(c, open_run_sources(c), steps=15)
        patches = np.zeros(2, dtype=np.int64)
        for batch in data.micro_batches():
            assert batch.source_BS is not None
            patches += np.bincount(batch.source_BS.flatten()[batch.patch_target_P], minlength=2)
        counted = data.counts_by_source(range(15))
        assert patches.tolist() == counted[:, SOURCE_COUNT_NAMES.index("patch_tokens")].tolist()
        found[tiles] = (data.plan_key, patches.tolist(), counted[:, 0].tolist())
    (key, many, drawn), (other_key, few, same_draw) = found[None], found[1]
    assert key != other_key and drawn == same_draw and few[0] < many[0] and few[1] == many[1]


@pytest.mark.parametrize("batch_unit", ["packs", "samples"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_counts_by_source_are_those_of_the_batches(prefixes: Path, shuffle: bool, batch_unit: str) -> None:
    mixture = {"train": [source("a"), source("b", epochs=0.3)], "aux": [source("c")]}
    c = config(prefixes, mixture, skip_long_samples=True)
    c = dataclasses.replace(c, schedule=dataclasses.replace(c.schedule, batch_unit=batch_unit))
    data = loader(c, open_run_sources(c), steps=30, shuffle=shuffle)
    batches = data.micro_batches()
    total = np.zeros((3, 4), dtype=np.int64)
    for step in range(data.steps_available):
        found = np.zeros((3, 3), dtype=np.int64)
        for batch in (next(batches) for _ in range(data.micro_batches_of(0))):
            assert batch.source_BS is not None and batch.num_sources == 3
            positions = (batch.labels_BS != IGNORE_INDEX, batch.text_mask_BS, batch.patch_target_P)
            for column, where in enumerate(positions):
                chosen = batch.source_BS.flatten()[where.flatten()]
                assert (chosen >= 0).all()
                found[:, column] += np.bincount(chosen, minlength=3)
            # Whatever is no padding is of some source.
            is_padding = (batch.source_BS == -1) & ~batch.text_mask_BS
            assert ((batch.source_BS == -1) == is_padding).all()
        counted = data.counts_by_source(range(step, step + 1))
        assert found.tolist() == counted[:, 1:].tolist(), step
        counts = data.counts(step)
        assert counted[:, 1:].sum(axis=0).tolist() == [counts.lm_tokens, counts.text_tokens, counts.patch_tokens]
        total += counted
        assert (total == data.counts_by_source(range(step + 1))).all()
    assert (total > 0).all()


def test_one_source_has_no_numbers(prefixes: Path) -> None:
    c = config(prefixes, {"train": [source("a")]})
    batch = next(loader(c, open_run_sources(c)).micro_batches())
    assert batch.source_BS is None and batch.num_sources == 1
