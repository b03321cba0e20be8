"""Whether our blocks compute what transformers computes with the folders that they were imported from.

They are compared layer by layer on a fixed batch in fp32. Our side is built one block at a time, so that only
transformers' model is in memory whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from megatron_haplovl.checkpoint.weight_files import WeightReader
from megatron_haplovl.config.files import read_config
from megatron_haplovl.config.schema import ModelConfig
from megatron_haplovl.conversion.hf_sources import vision_tower_of
from megatron_haplovl.data.image_processing import CLIP_MEAN, CLIP_STD
from megatron_haplovl.kernels.mask import MixedMask
from megatron_haplovl.model.attention_inputs import AttentionInputs
from megatron_haplovl.model.block import Block
from megatron_haplovl.model.embeddings import cut_patches
from megatron_haplovl.model.haplovl import HaploVL

_TOKENS = 64


@dataclass(frozen=True)
class TowerDifference:
    """Result of :func:`compare_vision_tower` and :func:`compare_language_model`."""

    layers: tuple[float, ...]
    """For each layer, the largest difference of its output when it is given transformers' input."""
    largest_value: float
    """Largest value in these outputs."""
    end: float
    """Largest difference of the last layer's output, or of the logits, after each model has run through on its own."""
    largest_end: float
    """Largest value there."""


@torch.no_grad()
def compare_vision_tower(checkpoint: str | Path, folder: str | Path) -> TowerDifference:
    """Compare the embedding of patches and the pre-decoder's blocks with those of the vision tower they came from.

    Both see the patches of an image without a class token, at position 0, where RoPE turns nothing. If the
    checkpoint's image size is another one, transformers interpolates its position embedding, too. If the tower has no
    norm in front of its blocks, ours is left out.

    Args:
        checkpoint: a `global_stepN` folder.
        folder: the vision tower's folder that it was imported from.
    """
    config = read_config(checkpoint).model
    ours = _Parts(checkpoint, config)
    family, _ = vision_tower_of(folder)
    tower = family.model_class.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True, trust_remote_code=False
    )
    inner: Any = getattr(tower.eval(), "vision_model", tower)  # The names differ between releases of transformers.
    side, cells = config.vision.image_size, config.vision.cells_per_tile
    colours = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    pixels = (colours - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    patches_BSF = cut_patches(pixels, config.vision.patch_size).view(2, cells, -1)
    x_BSD = patches_BSF @ ours.get("embedding.patch.weight").T + ours.get("embedding.position")
    their_pixels = (colours - torch.tensor(family.mean).view(3, 1, 1)) / torch.tensor(family.std).view(3, 1, 1)
    theirs_BSD = inner.embeddings(their_pixels, interpolate_pos_encoding=True)[:, family.leading_positions :]
    if family.has_first_norm:
        theirs_BSD = inner.pre_layrnorm(theirs_BSD)
        x_BSD = ours.part("embedding.pre_norm")(x_BSD)
    everything = torch.full((2, cells), cells, dtype=torch.int32)
    inputs = AttentionInputs(
        MixedMask(torch.zeros_like(everything), everything), torch.zeros(2, cells).long(), "reference"
    )
    walk = _Walk(ours, "pre_decoder", inputs, x_BSD)
    theirs_BSD = walk.beside(inner.encoder.layers, lambda: inner.encoder(inputs_embeds=theirs_BSD)).last_hidden_state
    return walk.result(walk.x_BSD, theirs_BSD)


@torch.no_grad()
def compare_language_model(checkpoint: str | Path, folder: str | Path) -> TowerDifference:
    """Compare the text embedding, the post-decoder, the final norm and the output head with a language model's.

    Args:
        checkpoint: a `global_stepN` folder.
        folder: the language model's folder that it was imported from.
    """
    config = read_config(checkpoint).model
    ours = _Parts(checkpoint, config)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True, trust_remote_code=False
    ).eval()
    generator = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(0, config.vocab_size, (2, _TOKENS), generator=generator)
    end_BS = torch.arange(1, _TOKENS + 1, dtype=torch.int32).expand(2, -1)
    inputs = AttentionInputs(
        MixedMask(torch.zeros_like(end_BS), end_BS), torch.arange(_TOKENS).expand(2, -1), "reference"
    )
    walk = _Walk(ours, "post_decoder", inputs, nn.functional.embedding(tokens_BS, ours.get("embedding.text.weight")))
    their_logits_BSV = walk.beside(theirs.model.layers, lambda: theirs(tokens_BS, use_cache=False)).logits
    hidden_BSL = ours.part("final_norm")(walk.x_BSD)
    return walk.result(hidden_BSL @ ours.get("lm_head.weight").T, their_logits_BSV)


class _Parts:
    """Our model's layers in fp32, each read from the checkpoint when it is asked for."""

    def __init__(self, checkpoint: str | Path, config: ModelConfig) -> None:
        self._reader = WeightReader(checkpoint)
        with torch.device("meta"):
            self._model = HaploVL(config)

    def get(self, name: str) -> torch.Tensor:
        return self._reader.get(name).float()

    def part(self, path: str) -> nn.Module:
        module = self._model.get_submodule(path)
        module.load_state_dict({name: self.get(f"{path}.{name}") for name in module.state_dict()}, assign=True)
        return module.eval()


class _Walk:
    """Our blocks, run beside transformers' layers: each on transformers' input, and all of them one after the other."""

    def __init__(self, ours: _Parts, decoder: str, inputs: AttentionInputs, x_BSD: torch.Tensor) -> None:
        self.x_BSD = x_BSD
        self._ours = ours
        self._decoder = decoder
        self._inputs = inputs
        self._differences: list[float] = []
        self._largest = 0.0

    def beside(self, layers: Sequence[nn.Module], run: Callable[[], Any]) -> Any:
        """Call `run`, which calls every layer once and in order."""
        hooks = [layer.register_forward_hook(self._after_layer, with_kwargs=True) for layer in layers]
        output = run()
        for hook in hooks:
            hook.remove()
        assert len(self._differences) == len(layers)
        return output

    def result(self, ours: torch.Tensor, theirs: torch.Tensor) -> TowerDifference:
        """The differences of all layers, and the one at the end."""
        end, largest_end = float((ours - theirs).abs().max()), float(theirs.abs().max())
        return TowerDifference(tuple(self._differences), self._largest, end, largest_end)

    def _after_layer(
        self, _layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any
    ) -> None:
        block = self._ours.part(f"{self._decoder}.{len(self._differences)}")
        assert isinstance(block, Block)
        given_BSD = arguments[0] if arguments else keywords["hidden_states"]
        theirs_BSD = output[0] if isinstance(output, tuple) else output
        self._differences.append(float((block(given_BSD, self._inputs) - theirs_BSD).abs().max()))
        self._largest = max(self._largest, float(theirs_BSD.abs().max()))
        self.x_BSD = block(self.x_BSD, self._inputs)
        block.to("meta")
