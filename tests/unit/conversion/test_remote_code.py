"""An exported folder loads where this package cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from megatron_haplovl.config.schema import Config, DataConfig
from megatron_haplovl.conversion.export import export_checkpoint
from megatron_haplovl.conversion.verify import fixed_inputs
from megatron_haplovl.data.chat_template import load_chat_template
from megatron_haplovl.data.tokenizer import load_tokenizer
from megatron_haplovl.hf import HaploForConditionalGeneration, HaploProcessor
from tests.fixtures.tiny_haplo import generate, random_haplovl, save_training_checkpoint, tiny_model, train_tokenizer

_ELSEWHERE = """
import json, sys
sys.modules["megatron_haplovl"] = None  # Importing it raises ImportError.
import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

folder, inputs = sys.argv[1], json.load(sys.stdin)
images = [[Image.fromarray(np.array(image, dtype=np.uint8)) for image in row] for row in inputs["images"]]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
batch = processor(text=inputs["texts"], images=images)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
same = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(same).__name__ == type(model).__name__
with torch.no_grad():
    logits = model(**batch).logits
print(json.dumps([
    processor.apply_chat_template([{"role": "user", "content": "red"}]),
    {name: value.tolist() for name, value in batch.items()},
    logits.tolist(),
    model.generate(**batch, max_new_tokens=4).tolist(),
]))
"""


def test_the_folder_needs_transformers_alone(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(train_tokenizer(tmp_path))
    config = Config(model=tiny_model(), data=DataConfig(seq_length=96))
    save_training_checkpoint(random_haplovl(config.model), config, tmp_path / "training")
    folder = tmp_path / "haplo"
    export_checkpoint(tmp_path / "training", folder, tokenizer, load_chat_template("vicuna_v1"))

    texts, images = fixed_inputs(config.model.vision.image_size)
    inputs = {"texts": texts, "images": [[np.asarray(image).tolist() for image in row] for row in images]}
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", _ELSEWHERE, str(folder)],
        input=json.dumps(inputs),
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    prompt, batch, logits, tokens = json.loads(result.stdout)

    processor = HaploProcessor.from_pretrained(folder)
    model = HaploForConditionalGeneration.from_pretrained(folder)
    assert prompt == processor.apply_chat_template([{"role": "user", "content": "red"}])
    here = processor(text=texts, images=images)
    assert {name: value.tolist() for name, value in here.items()} == batch
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(logits), model(**here).logits, atol=0, rtol=1e-6)
    assert generate(model, here, max_new_tokens=4).tolist() == tokens
