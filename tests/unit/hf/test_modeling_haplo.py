"""Mask, cache and padding of the Hugging Face model, against dense loops and against itself without the shortcut."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BatchFeature, DynamicCache

from megatron_haplovl.hf import HaploConfig, HaploForConditionalGeneration
from megatron_haplovl.hf.layers_haplo import mixed_mask
from megatron_haplovl.hf.modeling_haplo import NEWLINE, TEXT
from tests.fixtures.tiny_haplo import generate

_IMAGE, _VIDEO = 28, 29
_BASE = {
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "image_token_index": _IMAGE,
    "video_token_index": _VIDEO,
    "patch_size": 2,
    "default_image_size": 4,
}
_PRE = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
_SEED = 21
# Largest differences over ten seeds, with logits up to 32: 2.1e-5 between eager and sdpa, 4.9e-5 between a row alone
# and in a batch.
_TOLERANCE = 2e-4
_GREEDY: dict[str, Any] = {
    "max_new_tokens": 8,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
    "suppress_tokens": [_IMAGE, _VIDEO],
}


def _model(implementation: str = "sdpa", **base: Any) -> HaploForConditionalGeneration:
    settings: Any = {"attn_implementation": implementation}
    config = HaploConfig(base_config={**_BASE, **base}, pre_config=_PRE, **settings)
    model = HaploForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(_SEED)
    for name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = centre + 0.5 * torch.randn(parameter.shape, generator=generator)
    model.lm_head.weight.data *= 4
    return model


def _row(*parts: int | tuple[int, ...], first: int = 0) -> dict[str, torch.Tensor]:
    """One sequence: a number is a text token, a tuple the visual sources of an image."""
    ids: list[int] = []
    source: list[int] = []
    start: list[int] = []
    for part in parts:
        block = (part,) if isinstance(part, int) else part
        ids += [part] if isinstance(part, int) else [_IMAGE] * len(block)
        source += [TEXT] if isinstance(part, int) else list(block)
        start += [first + len(start)] * len(block)
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
        "visual_source": torch.tensor([source]),
        "attention_start_ids": torch.tensor([start]),
    }


def _tiles(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(5))


def _single() -> dict[str, torch.Tensor]:
    return {**_row(1, 2, (0, 1, NEWLINE, 2, 3, NEWLINE), 5, (4, 5, 6, 7), 6, 7), "pixel_values": _tiles(2)}


def _batch() -> tuple[BatchFeature, list[dict[str, torch.Tensor]]]:
    """A left-padded batch (two images, one image, text only), and its rows by themselves."""
    rows = [
        _single(),
        {**_row(9, (0, 1, 2, 3), 4), "pixel_values": _tiles(3)[2:]},
        {name: value for name, value in _row(3, 8, 4).items() if name in ("input_ids", "attention_mask")},
    ]
    length = rows[0]["input_ids"].shape[1]
    batch = {
        "input_ids": torch.zeros(3, length, dtype=torch.int64),
        "attention_mask": torch.zeros(3, length, dtype=torch.int64),
        "visual_source": torch.full((3, length), TEXT),
        "attention_start_ids": torch.arange(length).repeat(3, 1),
        "pixel_values": _tiles(3),
    }
    for i, (row, first_patch) in enumerate(zip(rows, (0, 8, 0), strict=True)):
        span = slice(length - row["input_ids"].shape[1], length)
        batch["input_ids"][i, span] = row["input_ids"][0]
        batch["attention_mask"][i, span] = 1
        if "visual_source" in row:
            source = row["visual_source"][0]
            batch["visual_source"][i, span] = torch.where(source >= 0, source + first_patch, source)
            batch["attention_start_ids"][i, span] = row["attention_start_ids"][0] + span.start
    return BatchFeature(batch), rows


def test_mixed_mask_against_loops() -> None:
    start = [[0, 1, 2, 2, 2, 5, 6, 6, 8], [0, 1, 2, 3, 3, 5, 5, 5, 8]]
    real = [[1] * 9, [0, 0, 1, 1, 1, 1, 1, 1, 1]]
    for queries in (9, 4, 1):
        mask = mixed_mask(torch.tensor(start), torch.tensor(real).bool(), queries)
        assert mask.shape == (2, 1, queries, 9)
        for b, i, j in itertools.product(range(2), range(9 - queries, 9), range(9)):
            same_image = start[b][i] == start[b][j]
            visible = bool(real[b][j]) and (j <= i or same_image)
            assert bool(mask[b, 0, i - (9 - queries), j]) == (visible or i == j), (b, i, j)


def test_image_tokens_see_each_other_and_text_is_causal() -> None:
    """The derivative of each hidden state with respect to each embedding shows what depends on what."""
    model = _model().double()
    inputs = _single()
    seen: list[torch.Tensor] = []
    model.model.pre_norm.register_forward_hook(lambda _module, _args, output: seen.append(output.requires_grad_()))
    hidden = model.model(**inputs).last_hidden_state[0]
    start = inputs["attention_start_ids"][0].tolist()
    for i in range(len(start)):
        (gradient,) = torch.autograd.grad(hidden[i].sum(), seen[0], retain_graph=True)
        depends = gradient[0].abs().sum(dim=1) > 0
        assert depends.tolist() == [j <= i or start[j] == start[i] for j in range(len(start))]


def test_sdpa_equals_eager() -> None:
    """No implementation falls back to a causal mask."""
    batch, _ = _batch()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        eager, sdpa = (_model(name)(**batch).logits[real] for name in ("eager", "sdpa"))
        causal = {**batch, "attention_start_ids": torch.arange(real.shape[1]).repeat(3, 1)}
        changed = _model("sdpa")(**causal).logits[real]
    torch.testing.assert_close(sdpa, eager, atol=_TOLERANCE, rtol=0)
    assert (changed - eager).abs().max() > 0.1


def test_other_implementations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"flash|flex|support"):
        _model("flash_attention_2")
    with pytest.raises(ValueError, match=r"flash|flex|support"):
        _model("flex_attention")


def test_cached_generation_equals_recomputation() -> None:
    model = _model()
    batch, _ = _batch()
    cached = generate(model, batch, **_GREEDY)
    assert torch.equal(cached, generate(model, batch, use_cache=False, **_GREEDY))
    # Decoding by hand, without `generate`, gives the same.
    inputs = _single()
    for _ in range(8):
        with torch.no_grad():
            token = model(**inputs).logits[:, -1:].argmax(dim=-1)
        length = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token], dim=1)
        inputs["attention_mask"] = torch.ones(1, length + 1, dtype=torch.int64)
        inputs["visual_source"] = torch.cat([inputs["visual_source"], torch.tensor([[TEXT]])], dim=1)
        inputs["attention_start_ids"] = torch.cat([inputs["attention_start_ids"], torch.tensor([[length]])], dim=1)
    assert cached[:1].tolist() == inputs["input_ids"].tolist()
    assert len(set(cached[0, -8:].tolist())) > 2, "a model that repeats one token proves little"


def test_each_row_of_a_padded_batch_is_as_alone() -> None:
    model = _model()
    batch, rows = _batch()
    together = generate(model, batch, **_GREEDY)
    with torch.no_grad():
        logits = model(**batch).logits
    for i, row in enumerate(rows):
        length = row["input_ids"].shape[1]
        alone = generate(model, row, **_GREEDY)
        assert together[i, -8:].tolist() == alone[0, -8:].tolist()
        with torch.no_grad():
            torch.testing.assert_close(logits[i, -length:], model(**row).logits[0], atol=_TOLERANCE, rtol=0)


def test_beams_and_several_answers_share_the_images() -> None:
    model = _model()
    batch, _ = _batch()
    beams = generate(model, batch, num_beams=3, **_GREEDY)
    assert torch.equal(beams, generate(model, batch, num_beams=3, use_cache=False, **_GREEDY))
    # Beam search keeps at least the likelihood of the greedy answer.
    repeated = generate(model, batch, **{**_GREEDY, "do_sample": True}, num_return_sequences=2, top_k=1)
    greedy = generate(model, batch, **_GREEDY)
    assert torch.equal(repeated, greedy.repeat_interleave(2, dim=0))


def test_a_text_can_continue_from_a_cache() -> None:
    model = _model()
    inputs = _single()
    cache = DynamicCache()
    with torch.no_grad():
        model(**inputs, past_key_values=cache, use_cache=True)
        continued = model(input_ids=torch.tensor([[4, 5]]), past_key_values=cache, use_cache=True).logits
        more = _row(1, 2, (0, 1, NEWLINE, 2, 3, NEWLINE), 5, (4, 5, 6, 7), 6, 7, 4, 5)
        whole = model(**more, pixel_values=inputs["pixel_values"]).logits
        with pytest.raises(ValueError, match="cannot follow a cached part"):
            model(**inputs, past_key_values=cache)
    torch.testing.assert_close(continued, whole[:, -2:], atol=_TOLERANCE, rtol=0)


def test_loss_is_of_the_next_token() -> None:
    model = _model()
    inputs = _single()
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, -2:] = inputs["input_ids"][0, -2:]
    output = model(**inputs, labels=labels)
    log_probability = output.logits[0].log_softmax(dim=-1)
    expected = -(log_probability[-3, labels[0, -2]] + log_probability[-2, labels[0, -1]]) / 2
    torch.testing.assert_close(output.loss, expected)


def _without(name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in _single().items() if key != name}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (_without("visual_source"), "holds 10 image and video placeholders, visual_source names 0"),
        (_without("attention_start_ids"), "mask would be plain causal"),
        (_without("pixel_values"), "names patch 7, pixel_values hold 0"),
        ({**_single(), "pixel_values": _tiles(1)}, "names patch 7, pixel_values hold 4"),
        ({**_single(), "attention_mask": torch.ones(1, 5)}, r"attention_mask has the shape \(1, 5\), expected"),
        ({**_single(), "visual_source": torch.zeros(1, 3).long()}, "visual_source has the shape"),
    ],
)
def test_inputs_that_contradict_each_other(inputs: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _model()(**inputs)


def test_newlines_need_a_newline() -> None:
    with pytest.raises(ValueError, match="image_newline false"):
        _model(image_newline=False)(**_single())


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling .*'yarn'.* is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rope_scaling .* lacks low_freq_factor, high_freq"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"norm_mode": "batchnorm"}, "norm_mode"),
        ({"num_attention_heads": 3}, "not a multiple of 3 heads"),
    ],
)
def test_settings_that_are_not_supported(base: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _model(**base)


def test_configuration_survives_saving(tmp_path: Path) -> None:
    config = _model().config
    config.vocab_size = 31  # what `resize_token_embeddings` does
    config.save_pretrained(tmp_path)
    loaded = HaploConfig.from_pretrained(tmp_path)
    assert loaded.vocab_size == 31
    assert loaded.base_config == {**config.base_config, "vocab_size": 31}
    assert (loaded.pre_config, loaded.post_config) == (config.pre_config, config.post_config)
