"""`generate` of the exported model gives the tokens that greedy decoding of the training model gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_haplovl.config.schema import Config, DataConfig, ModelConfig
from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.conversion.export import export_checkpoint
from megatron_haplovl.conversion.verify import fixed_inputs, training_batch
from megatron_haplovl.data.chat_template import load_chat_template
from megatron_haplovl.data.tokenizer import TextTokenizer, load_tokenizer
from megatron_haplovl.hf import HaploForConditionalGeneration, HaploProcessor
from megatron_haplovl.model.haplovl import HaploVL
from tests.fixtures.tiny_haplo import generate, random_haplovl, save_training_checkpoint, tiny_model, train_tokenizer

_TOKENS = 12
_MODELS: dict[str, ModelConfig] = {
    "any resolution": tiny_model(),
    "one tile": tiny_model(vision=VisionConfig(patch_size=4, image_size=8)),
    "images as causal as text": tiny_model(image_attention="causal"),
    "q/k/v biases": tiny_model(post=dataclasses.replace(tiny_model().post, qkv_bias=True)),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return load_tokenizer(train_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@torch.no_grad()
def _greedy(
    network: HaploVL, text: str, images: Sequence[Image.Image], tokenizer: TextTokenizer, vision: VisionConfig
) -> list[int]:
    """Greedy decoding by training's own data path and model: everything is computed anew for each token."""
    token_ids = list(tokenizer.encode(text)[0])
    prompt = len(token_ids)
    for _ in range(_TOKENS):
        logits_V = network.logits(training_batch([token_ids], [images], tokenizer, vision))[0, -1]
        logits_V[list(tokenizer.placeholder_ids)] = -torch.inf
        token_ids.append(int(logits_V.argmax()))
    return token_ids[prompt:]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", _MODELS)
def test_generate(tmp_path: Path, tokenizer: TextTokenizer, name: str, implementation: str) -> None:
    model = _MODELS[name]
    # The deviation is so large that the answers do not repeat one token.
    network = random_haplovl(model, std=0.6)
    save_training_checkpoint(network, Config(model=model, data=DataConfig(seq_length=96)), tmp_path / "training")
    export_checkpoint(tmp_path / "training", tmp_path / "haplo", tokenizer, load_chat_template("vicuna_v1"))
    exported = HaploForConditionalGeneration.from_pretrained(tmp_path / "haplo", attn_implementation=implementation)
    processor = HaploProcessor.from_pretrained(tmp_path / "haplo")

    # Text alone, one image, two images: three lengths, so that a batch of them is padded on the left.
    texts, images = fixed_inputs(model.vision.image_size)
    expected = [
        _greedy(network, text, row_images, tokenizer, model.vision)
        for text, row_images in zip(texts, images, strict=True)
    ]
    assert all(len(set(tokens)) > 2 for tokens in expected), "a model that repeats itself proves little"
    together = processor(text=texts, images=images)
    assert together["attention_mask"].sum(dim=1).unique().numel() == len(texts)
    alone = [processor(text=text, images=row_images or None) for text, row_images in zip(texts, images, strict=True)]
    for use_cache in (True, False):

        def answers(inputs: Mapping[str, torch.Tensor], use_cache: bool = use_cache) -> list[list[int]]:
            tokens = generate(exported, inputs, max_new_tokens=_TOKENS, eos_token_id=None, use_cache=use_cache)
            return tokens[:, inputs["input_ids"].shape[1] :].tolist()

        assert answers(together) == expected
        assert [answers(inputs)[0] for inputs in alone] == expected
