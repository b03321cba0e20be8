"""What is derived from the mask's two vectors, enumerated against its definition."""

import pytest
import torch

from megatron_haplovl.kernels.mask import MixedMask, causal
from tests.unit.kernels.test_attention import LAYOUTS, mixed_mask
from tests.unit.kernels.test_attention_cpu import random_layout

CPU = torch.device("cpu")
ALL = [*LAYOUTS.values(), *(random_layout(seed) for seed in range(20))]


@pytest.mark.parametrize("layout", range(len(ALL)))
def test_everything_derived_is_the_mask(layout):
    mask, dense = mixed_mask(*ALL[layout])
    n = len(dense)
    assert torch.equal(mask.dense(CPU)[0], dense)
    assert mask.visible_pairs == int(dense.sum())

    q_start, q_end = (x[0] for x in mask.inverse(CPU))
    row = torch.arange(n).unsqueeze(1)
    assert torch.equal((row >= q_start) & (row < q_end), dense)

    assert [r for s in mask.segments for r in range(s.start, s.end)] == list(range(n))
    for s in mask.segments:
        expected = torch.zeros(s.end - s.start, n, dtype=torch.bool)
        for i in range(s.end - s.start):
            keys = {
                "image": slice(s.key_start, s.key_end),
                "text": slice(s.key_start, s.key_end - (s.end - s.start) + i + 1),
                "alone": slice(s.key_start + i, s.key_start + i + 1),
            }
            expected[i, keys[s.kind]] = True
        assert torch.equal(dense[s.start : s.end], expected)
        if s.kind == "alone":
            assert not dense[torch.arange(n) >= s.end, s.start : s.end].any()


def test_segments_are_as_long_as_they_can_be():
    mask, _ = mixed_mask([[3, -4, 2, -2, -5, 1], [4]], 3)
    assert [(s.start, s.end, s.key_start, s.key_end, s.kind) for s in mask.segments] == [
        (0, 3, 0, 3, "text"),
        (3, 7, 0, 7, "image"),
        (7, 9, 0, 9, "text"),
        (9, 11, 0, 11, "image"),
        (11, 16, 0, 16, "image"),
        (16, 17, 0, 17, "text"),
        (17, 21, 17, 21, "text"),
        (21, 24, 21, 24, "alone"),
    ]


def test_keys_that_a_chunk_does_not_see_have_empty_intervals():
    mask, dense = mixed_mask([[4], [3, -2, 2]], 0)
    chunk = mask.rows(7, 10)
    q_start, q_end = (x[0] for x in chunk.inverse(CPU))
    row = torch.arange(3).unsqueeze(1)
    assert torch.equal((row >= q_start) & (row < q_end), dense[7:10, :10])
    assert (q_end[:4] == q_start[:4]).all()


def test_padding_in_a_chunk_is_padding():
    mask, _ = mixed_mask([[4]], 3)
    assert [(s.start, s.end, s.key_start, s.kind) for s in mask.rows(3, 7).segments] == [
        (0, 1, 0, "text"),
        (1, 4, 4, "alone"),
    ]


def test_a_chunk_must_not_end_inside_an_image():
    mask, _ = mixed_mask([[3, -4, 2]], 0)
    for end in (4, 5, 6):
        with pytest.raises(ValueError, match=f"ends at {end}, inside an image that ends at 7"):
            mask.rows(0, end)
    assert mask.rows(3, 7).num_keys == 7
    for start, end in ((3, 3), (5, 3), (0, 10), (-1, 3)):
        with pytest.raises(ValueError, match=f"rows {start} to {end} are not a chunk of 9 queries"):
            mask.rows(start, end)


def test_causal_hides_the_later_tokens_of_an_image():
    mask, dense = mixed_mask([[3, -4, 2], [-3]], 2)
    expected = dense & torch.ones_like(dense).tril()
    assert torch.equal(causal(mask).dense(CPU)[0], expected)
    assert torch.equal(causal(mask.rows(7, 12)).dense(CPU)[0], expected[7:12, :12])


def test_derived_once():
    mask = MixedMask(torch.zeros(1, 4, dtype=torch.int32), torch.arange(1, 5, dtype=torch.int32).unsqueeze(0))
    assert mask.dense(CPU) is mask.dense(CPU)
    assert mask.segments is mask.segments
