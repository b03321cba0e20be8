"""Videos and several images, from a prefix through both stages to an export that prepares and answers the same."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_haplovl.checkpoint.folders import resolve_checkpoint
from megatron_haplovl.checkpoint.pieces import open_checkpoint
from megatron_haplovl.config.files import read_config
from megatron_haplovl.data.chat_template import ConversationEncoder, load_chat_template
from megatron_haplovl.data.dataset import collate, lay_out_document
from megatron_haplovl.data.image_processing import normalise
from megatron_haplovl.data.sources import IndexedSource
from megatron_haplovl.data.tokenizer import load_tokenizer
from megatron_haplovl.hf import HaploForConditionalGeneration, HaploProcessor
from megatron_haplovl.model.haplovl import HaploVL
from tests.fixtures.tiny_haplo import chat_inputs, generate, noise_image
from tests.fixtures.visual_prefix import Visual, write_prefix_of
from tests.integration.test_end_to_end import SIZES, run, save_teachers

FRAMES = [noise_image(20, 30, seed) for seed in range(3)]
WIDE, TALL, SMALL = noise_image(16, 40, 7), noise_image(50, 17, 8), noise_image(9, 9, 9)
# The messages of each sample, and its media in order.
SAMPLES: list[tuple[str, list[Visual]]] = [
    ("<video>\nWhat color is it?", [FRAMES]),
    ("First <image> and then <image>: which?", [WIDE, TALL]),
    ("<image>\n<video>\nWhat color?", [WIDE, FRAMES[::-1]]),
    ("<video> and <video> and <image>?", [FRAMES[:1], FRAMES[1:], SMALL]),
    ("<image> What is it?", [TALL]),
    ("How many are two?", []),
]
SCHEDULE = "--train-iters 2 --global-batch-size 4 --lr 1e-3 --lr-warmup-iters 0 --log-interval 1 --num-workers 0"


@dataclass(frozen=True)
class Trained:
    """A prefix, and the last training's checkpoint and export."""

    prefix: str
    checkpoint: Path
    export: Path


@pytest.fixture(scope="module", params=["one tile each", "a budget"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_spm_model: Path) -> Trained:
    """Stage 1 and stage 2, two steps each; export."""
    folder = tmp_path_factory.mktemp("videos")
    tokenizer = load_tokenizer(str(tiny_spm_model))
    encoder = ConversationEncoder(tokenizer, load_chat_template("vicuna_v1"))
    samples = [
        ([{"role": "user", "content": question}, {"role": "assistant", "content": "The circle is red."}], visuals)
        for question, visuals in SAMPLES * 3
    ]
    prefix = str(folder / "train")
    assert write_prefix_of(prefix, encoder, samples).counts.videos == 12
    save_teachers(folder, tokenizer.vocab_size)
    budget = "--image-token-budget 16" if request.param == "a budget" else ""
    common = f"{SIZES} --vocab-size {tokenizer.vocab_size} {budget} --tokenizer-model {tiny_spm_model} {SCHEDULE}"
    data = f"--data-path {prefix}"
    run(
        f"{sys.executable} pretrain_haplovl.py {common} {data} --aux-data-path {prefix} --seq-length 512 "
        f"--vision-teacher {folder}/clip --language-model {folder}/llama --save {folder}/stage1"
    )
    run(
        f"{sys.executable} finetune_haplovl.py {common} {data} --pretrained-checkpoint {folder}/stage1 "
        f"--language-model {folder}/llama --save {folder}/full"
    )
    run(f"{sys.executable} tools/convert_checkpoint.py export --load {folder}/full --save {folder}/hf")
    return Trained(prefix, resolve_checkpoint(folder / "full"), folder / "hf")


def messages_of(question: str, visuals: list[Visual], answer: str | None) -> list[dict[str, Any]]:
    """The conversation in Hugging Face's form, media in their places."""
    media, content = iter(visuals), []
    for part in question.replace("<image>", "\0<image>\0").replace("<video>", "\0<video>\0").split("\0"):
        if part == "<image>":
            content.append({"type": "image", "image": next(media)})
        elif part == "<video>":
            content.append({"type": "video", "video": next(media)})
        elif part:
            content.append({"type": "text", "text": part})
    turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
    return turns if answer is None else [*turns, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def test_the_exported_processor_and_model_see_what_training_saw(trained: Trained) -> None:
    """The same ids and pixels from a conversation and from the files, and the same logits."""
    config = read_config(trained.checkpoint)
    source, vision = IndexedSource(trained.prefix), config.model.vision
    processor = HaploProcessor.from_pretrained(trained.export)
    theirs = HaploForConditionalGeneration.from_pretrained(
        trained.export, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    reader = open_checkpoint(trained.checkpoint)
    ours = HaploVL(config.model, attention_backend="reference").eval()
    ours.load_state_dict({name: reader.get(name).float() for name in reader.names()})
    for i, (question, visuals) in enumerate(SAMPLES):
        document = lay_out_document([source.read(i)], vision)
        assert len(document.tokens) == source.counts(vision).tokens[i]
        inputs = chat_inputs(processor, messages_of(question, visuals, "The circle is red."))
        found = inputs["input_ids"][0].numpy()
        assert len(found) == len(document.tokens)
        assert np.array_equal(found[document.is_text], document.tokens[document.is_text])
        if visuals:
            assert torch.equal(inputs["pixel_values"], torch.from_numpy(normalise(np.concatenate(document.tiles))))
        batch = collate([[document]], len(document.tokens), vision)
        with torch.no_grad():
            expected, logits = ours.logits(batch)[0], theirs(**inputs).logits[0, :, : config.model.vocab_size]
        # Measured: 3e-7 of logits up to 0.7; with a causal mask 6e-3 and more.
        torch.testing.assert_close(logits, expected, rtol=0, atol=5e-6)


def test_the_export_answers_about_a_video(trained: Trained) -> None:
    processor = HaploProcessor.from_pretrained(trained.export)
    model = HaploForConditionalGeneration.from_pretrained(trained.export, dtype=torch.float32).eval()
    question, visuals = SAMPLES[2]
    inputs = chat_inputs(processor, messages_of(question, visuals, None), add_generation_prompt=True)
    prompt = inputs["input_ids"].shape[1]
    cached, slow = (generate(model, inputs, max_new_tokens=4, use_cache=cache) for cache in (True, False))
    assert cached.shape[1] > prompt and torch.equal(cached, slow)
