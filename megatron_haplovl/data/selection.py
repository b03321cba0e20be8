"""Which samples of a source take part: strategies of sampling, and the side of a split.

Both random choices go by a sample's hash (`manifest.SAMPLE_HASHES`), which is made of what it holds. So the same record
is on the same side in every source, whatever its place, and a choice depends on neither seed nor order. The two use
different bits: what `random:1%` takes is no other than the rest with regard to the split.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import numpy.typing as npt

from megatron_haplovl.config.mixture import Sampling, Split

IntArray = npt.NDArray[np.int64]
HashArray = npt.NDArray[np.uint64]

SIDES = ("train", "valid")


def sampled(total: int, sampling: Sampling, cap: int | None, hashes_N: HashArray | None) -> IntArray | None:
    """Numbers of the samples that a strategy takes, in their order; None if it takes all.

    Args:
        total: samples of the source.
        sampling: the strategy.
        cap: most samples; of more, random ones are taken.
        hashes_N: hashes of all samples; None is enough if :func:`needs_hashes` says so.
    """
    number = sampling.number(total)
    chosen = np.arange(total, dtype=np.int64)
    if sampling.kind == "random" and number < total:
        chosen = _first_by_hash(chosen, number, hashes_N)
    elif sampling.kind == "end":
        chosen = chosen[total - number :]
    else:
        chosen = chosen[:number]
    if cap is not None and cap < len(chosen):
        chosen = _first_by_hash(chosen, cap, hashes_N)
    return None if len(chosen) == total else chosen


def needs_hashes(total: int, sampling: Sampling, cap: int | None) -> bool:
    """Whether :func:`sampled` has a random choice to make."""
    number = sampling.number(total)
    return (sampling.kind == "random" and number < total) or (cap is not None and cap < number)


def on_side(hashes_N: HashArray, split: Split, side: str) -> npt.NDArray[np.bool_]:
    """True at the samples of one side, `[N]`.

    Args:
        hashes_N: hashes of the samples.
        split: shares of the sides.
        side: "train" or "valid"; what is on neither is the test's.
    """
    assert side in SIDES
    # Held-out samples come first, so that a larger share for validation keeps those of a smaller one.
    if side == "valid":
        return hashes_N < _threshold(split.valid)
    return hashes_N >= _threshold(split.valid + split.test)


def _threshold(share: Fraction) -> np.uint64:
    return np.uint64(int(share * 2**64))


def _first_by_hash(numbers: IntArray, count: int, hashes_N: HashArray | None) -> IntArray:
    """So many of some samples, by a hash of their hash; in their order. The fewer are among the more."""
    assert hashes_N is not None
    keys = _mixed(hashes_N[numbers])
    # Of equal samples the earlier ones.
    return np.sort(numbers[np.argsort(keys, kind="stable")[:count]])


def _mixed(hashes: HashArray) -> HashArray:
    """Other 64 bits made of these, one to one (the finalizer of SplitMix64, Steele et al. 2014)."""
    mixed = hashes + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
