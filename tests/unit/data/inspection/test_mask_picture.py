"""The picture of the mask against the mask itself, pair by pair."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from megatron_haplovl.data.inspection.mask_picture import LONGEST_SIDE, mask_png, visible_shares


def vectors(lengths: list[int], image: tuple[int, int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Documents behind each other; the tokens `[start, end)` of the first are an image."""
    starts = np.cumsum([0, *lengths[:-1]])
    kv_start = np.repeat(starts, lengths)
    kv_end = np.arange(1, sum(lengths) + 1)
    kv_end[slice(*image)] = image[1]
    return kv_start, kv_end


@pytest.mark.parametrize("lengths", [[8], [5, 3], [16, 16, 32], [60, 4]])
@pytest.mark.parametrize("side", [1, 2, 4, 8])
def test_shares_are_those_of_the_pairs(lengths: list[int], side: int) -> None:
    kv_start, kv_end = vectors(lengths, (1, 4))
    length = len(kv_start)
    keys = np.arange(length)
    dense = ((keys >= kv_start[:, None]) & (keys < kv_end[:, None])).astype(float)
    whole = length // side
    expected = dense.reshape(side, whole, side, whole).mean(axis=(1, 3))
    np.testing.assert_allclose(visible_shares(kv_start, kv_end, side), expected)


@pytest.mark.parametrize("side", [3, 7, 64, 100])
def test_every_pair_is_counted_once_when_squares_cut_tokens(side: int) -> None:
    kv_start, kv_end = vectors([211, 89], (3, 150))
    shares = visible_shares(kv_start, kv_end, side)
    queries = np.bincount(np.minimum(np.arange(300) * side // 300, side - 1), minlength=side)
    assert (shares * queries[:, None]).sum() * 300 / side == pytest.approx((kv_end - kv_start).sum())
    assert shares.min() >= 0 and shares.max() <= 1 + 1e-9


def test_a_long_sequence_stays_small() -> None:
    kv_start, kv_end = vectors([20_000, 12_768], (5, 9000))
    picture = Image.open(io.BytesIO(mask_png(kv_start, kv_end)))
    assert picture.size == (LONGEST_SIDE, LONGEST_SIDE)
    pixels = np.asarray(picture)
    assert pixels[10, 50] < 60 and pixels[0, -1] == 255  # within the image, and of the other document


def test_a_short_sequence_is_enlarged() -> None:
    pixels = np.asarray(Image.open(io.BytesIO(mask_png(np.zeros(4, dtype=np.int64), np.arange(1, 5)))))
    assert pixels.shape == (256, 256)
    assert (pixels[::64, ::64] == np.where(np.tri(4), 55, 255)).all()
