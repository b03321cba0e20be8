"""Losses and consumed samples of each source, in every kind of layout, against one process with each document alone.

Planted once to see it fail: every context rank with the sources of the first one's positions, the sums of all ranks
added up, tensor-parallel ones among them, only those of the ranks of one pipeline stage.
"""

from __future__ import annotations

import pytest

from tests.distributed.cases import PARALLEL_RANKS, parallel_case
from tests.distributed.launch import run_ranks
from tests.distributed.sources import LAYOUTS, NAMES, logged, make_sources, reference, retrieval

RECIPES = ("distill", "full")
TERMS = {"distill": ("vision loss", "feature loss", "ctp loss"), "full": ("lm loss",)}
# Measured worst case over all layouts: 2.1e-7.
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_spm_model):
    folder = tmp_path_factory.mktemp("sources")
    make_sources(folder, tiny_spm_model)
    return folder


@pytest.fixture(scope="module")
def serial(folder):
    return {recipe: reference(folder, recipe) for recipe in RECIPES}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_each_source_is_as_in_one_process_with_each_document_alone(folder, serial, recipe, layout):
    run_ranks("worker_sources.py", PARALLEL_RANKS, str(folder), "0", parallel_case(recipe, layout))
    train, valid = logged(folder, recipe, layout)
    expected_train, expected_valid = serial[recipe]
    by_source = {name: value for name, value in train.items() if "/" in name}
    assert by_source == pytest.approx(expected_train, rel=TOLERANCE)
    assert by_source.keys() == {
        f"{term}/{name}" for term in (*TERMS[recipe], "consumed samples") for name in NAMES[recipe]
    }
    of_valid = {name.removeprefix("valid "): value for name, value in valid.items() if "/" in name}
    losses = {name: value for name, value in expected_valid.items() if not name.startswith("consumed")}
    assert of_valid == pytest.approx(losses, rel=TOLERANCE)


@pytest.fixture(scope="module")
def found_again(folder):
    return retrieval(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stage_1s_held_out_figures_are_as_in_one_process(folder, found_again, layout):
    train, valid = logged(folder, "distill", layout)
    assert valid["valid patch cosine"] == pytest.approx(1 - valid["valid vision loss"], abs=TOLERANCE)
    assert valid["valid patch retrieval"] == pytest.approx(found_again, rel=TOLERANCE)
    assert 0 < found_again < 1
    assert not any("patch" in name for name in train)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_sources_differ(serial, recipe):
    """Otherwise exchanged sources would not be seen."""
    for term in TERMS[recipe]:
        values = [serial[recipe][0][f"{term}/{name}"] for name in NAMES[recipe]]
        assert min(abs(a - b) for a in values for b in values if a is not b) > 50 * TOLERANCE * max(values), term
