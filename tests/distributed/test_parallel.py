"""Tensor, sequence and context parallelism with ZeRO on four ranks against one plain torch process.

The reference is that of `test_zero.py`, on data with several packed documents, several images, any-resolution images,
text-only samples and a rank without images: losses, gradient norms, every first gradient, weights after two steps.

Each of these was planted once, and made at least six of the cases fail: norm gradients of a sharded sequence not
summed; the gradient of a region's input not reduced; the loss scaled by the data-parallel ranks instead of all
replicas; a mask that is causal only inside context parallelism; the bias of a row-parallel layer added before the sum;
the heads' input gradient summed although it is whole; slices not marked for the gradient norm; the exchange of tokens
for heads joined in another order; the wrong patches' features for a context rank.
"""

from __future__ import annotations

import pytest
import torch

from tests.distributed.cases import (
    BF16_LAYOUTS,
    LARGE_LAYOUTS,
    LARGE_RANKS,
    PARALLEL_LAYOUTS,
    PARALLEL_RANKS,
    SHARED_HEADS,
    config,
)
from tests.distributed.launch import run_ranks
from tests.distributed.test_zero import train_serially

# Measured worst cases over all layouts: loss 1.2e-7, norm 9.1e-8 (both relative), gradients 1.4e-6 (relative to the
# largest of each parameter), weights 2.4e-6.
LOSS_TOLERANCE, NORM_TOLERANCE, GRADIENT_TOLERANCE, WEIGHT_TOLERANCE = 1e-6, 1e-6, 5e-6, 1e-5
# In bf16: losses and norms 1.9e-3, gradients 2.0e-2 (of each parameter's norm).
BF16_LOSS_TOLERANCE, BF16_GRADIENT_TOLERANCE = 5e-3, 5e-2


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    """One launch of all layouts of four ranks."""
    folder = tmp_path_factory.mktemp("parallel")
    bf16 = (f"bf16 {layout}" for layout in BF16_LAYOUTS)
    run_ranks("worker_parallel.py", PARALLEL_RANKS, str(folder), *PARALLEL_LAYOUTS, *bf16)
    return folder


@pytest.fixture(scope="module")
def distributed_8(tmp_path_factory):
    """One launch of all layouts of eight ranks."""
    folder = tmp_path_factory.mktemp("parallel8")
    run_ranks("worker_parallel.py", LARGE_RANKS, str(folder), *LARGE_LAYOUTS)
    return folder


@pytest.fixture(scope="module")
def serial():
    """Recipe -> (metrics, first gradients, weights)."""
    return {recipe: train_serially(config(recipe, **SHARED_HEADS)) for recipe in ("distill", "full")}


@pytest.mark.parametrize("layout", PARALLEL_LAYOUTS)
@pytest.mark.parametrize("recipe", ["distill", "full"])
def test_equals_one_plain_process(distributed, serial, recipe, layout):
    check(distributed, layout, recipe, *serial[recipe])


@pytest.mark.slow
@pytest.mark.parametrize("layout", LARGE_LAYOUTS)
@pytest.mark.parametrize("recipe", ["distill", "full"])
def test_eight_ranks_equal_one_plain_process(distributed_8, serial, recipe, layout):
    check(distributed_8, layout, recipe, *serial[recipe])


@pytest.mark.parametrize("layout", BF16_LAYOUTS)
@pytest.mark.parametrize("recipe", ["distill", "full"])
def test_bf16_stays_near_fp32(distributed, serial, recipe, layout):
    result = load(distributed, f"bf16 {layout}", recipe)
    metrics, gradients, weights = serial[recipe]
    for got, expected in zip(result["metrics"], metrics, strict=True):
        for name, value in expected.items():
            assert got[name] == pytest.approx(value, rel=BF16_LOSS_TOLERANCE), name
    for name, gradient in gradients.items():
        error = (result["gradients"][name].float() - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < BF16_GRADIENT_TOLERANCE, f"{name}: {error}"
    assert result["weights"].keys() == weights.keys()


def load(folder, layout, recipe):
    return torch.load(folder / f"{layout} {recipe}.pt".replace(" ", "_"), weights_only=True)


def check(folder, layout, recipe, metrics, gradients, weights):
    result = load(folder, layout, recipe)
    for got, expected in zip(result["metrics"], metrics, strict=True):
        for name, value in expected.items():
            tolerance = NORM_TOLERANCE if name == "grad norm" else LOSS_TOLERANCE
            assert got[name] == pytest.approx(value, rel=tolerance), name
    assert result["gradients"].keys() == gradients.keys()
    for name, gradient in gradients.items():
        # Relative to the largest gradient of the parameter.
        error = (result["gradients"][name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-6)
        assert error < GRADIENT_TOLERANCE, f"{name}: {error}"
    assert result["weights"].keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(result["weights"][name], weight, rtol=0, atol=WEIGHT_TOLERANCE, msg=name)
