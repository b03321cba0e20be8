"""The memory that the planner predicts against that of a real model: per layer, and the peak of a step.

    python benchmarks/planner_memory.py [--json PATH]

Per layer: the bytes that autograd keeps from forward to backward, each storage once. Peak: torch's `MemTracker` over
forward and backward. A CPU will do, because our layers keep the same on every device, except a norm's statistics.
"""

from __future__ import annotations

import argparse
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import MIB, machine, print_table, write_json
from megatron_haplovl.config.layout import Layout
from megatron_haplovl.config.schema import ModelConfig, PostDecoderConfig, PreDecoderConfig
from megatron_haplovl.config.stages import FINETUNE, PART_OF, StageSpec
from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data.batch import IGNORE_INDEX, Batch
from megatron_haplovl.data.dataset import Document, collate
from megatron_haplovl.data.image_geometry import image_layout
from megatron_haplovl.losses.distillation import distillation_loss
from megatron_haplovl.losses.language_modeling import next_token_loss
from megatron_haplovl.model.attention_inputs import AttentionInputs
from megatron_haplovl.model.block import Block
from megatron_haplovl.model.haplovl import HaploVL, HaploVLForDistillation
from megatron_haplovl.model.initialization import initialize_weights
from megatron_haplovl.planning.cost import layer_costs
from megatron_haplovl.planning.cost_units import LayerCost, Precision
from megatron_haplovl.planning.estimate import most_held
from megatron_haplovl.planning.work import work_of_batch

# The 8B model's proportions at an eighth of its widths.
CONFIG = ModelConfig(
    vocab_size=8192,
    vision=VisionConfig(image_size=56, patch_size=14, image_aspect_ratio="resize", image_newline=True),
    pre=PreDecoderConfig(num_layers=3, hidden_size=128, ffn_hidden_size=512, num_attention_heads=4),
    post=PostDecoderConfig(
        num_layers=4, hidden_size=512, ffn_hidden_size=1792, num_attention_heads=8, num_key_value_heads=2
    ),
)
STAGE2 = frozenset({"embedding", "pre_decoder", "connector", "post_decoder"})
STAGE1 = frozenset({"embedding", "pre_decoder", "distillation"})


def make_batch(config: ModelConfig, texts: tuple[int, ...], seq_length: int, untrained: int = 0) -> Batch:
    """One sequence of documents, then padding.

    Each document is an image and as many text tokens as `texts` says, of which the first `untrained` are not trained.
    """
    random = np.random.default_rng(0)
    size = config.vision.image_size
    layout = image_layout(size, size, config.vision)
    documents = []
    for text in texts:
        total = layout.num_tokens + text
        is_text = np.arange(total) >= layout.num_tokens
        tokens = np.where(is_text, random.integers(0, config.vocab_size, total), 0)
        is_target = np.arange(total) >= layout.num_tokens + untrained
        documents.append(
            Document(
                tokens=tokens,
                labels=np.append(np.where(is_target, tokens, IGNORE_INDEX)[1:], IGNORE_INDEX),
                is_text=is_text,
                kv_end=np.where(is_text, np.arange(1, total + 1), layout.num_tokens),
                patch_source=layout.patch_source(),
                patch_target=layout.patch_offsets(),
                newline_target=layout.newline_offsets(),
                tiles=[random.integers(0, 256, (1, 3, size, size), dtype=np.uint8)],
                source=np.zeros(total, dtype=np.int32),
            )
        )
    return collate([documents], seq_length, config.vision, config.image_attention)


@dataclass(eq=False)
class _Kept:
    """A tensor that autograd keeps; alive as long as the graph holds it."""

    tensor: torch.Tensor


class SavedBytes:
    """Counts what autograd keeps: each storage once, where it is first kept, without weights."""

    def __init__(self, model: nn.Module) -> None:
        self._known = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def ignore(self, *tensors: torch.Tensor) -> None:
        """Count these nowhere."""
        self._known.update(tensor.untyped_storage().data_ptr() for tensor in tensors)

    def of(self, forward: Callable[[], Any]) -> tuple[Any, int]:
        """What a forward pass returns, and the bytes that it leaves for backward.

        Some operations take a derivative at once; what they keep for it is gone by then and is not counted.
        """
        kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

        def pack(tensor: torch.Tensor) -> _Kept:
            item = _Kept(tensor)
            kept.add(item)
            return item

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda item: item.tensor):
            result = forward()
        storages = {item.tensor.untyped_storage().data_ptr(): item.tensor.untyped_storage() for item in kept}
        new = {pointer: storage.nbytes() for pointer, storage in storages.items() if pointer not in self._known}
        self._known.update(new)
        return result, sum(new.values())


def run_block(block: Block, x_BSD: torch.Tensor, inputs: AttentionInputs, recompute: str) -> torch.Tensor:
    """A block as it runs under --recompute-granularity."""
    if recompute == "full":
        out: torch.Tensor = checkpoint(block, x_BSD, inputs, use_reentrant=False)
        return out
    if recompute == "none":
        return block(x_BSD, inputs)
    x_BSD = x_BSD + block.attention(block.attention_norm(x_BSD), inputs)

    def inside(x_BSD: torch.Tensor) -> torch.Tensor:
        return block.mlp(block.mlp_norm(x_BSD))

    return x_BSD + checkpoint(inside, x_BSD, use_reentrant=False)


def build(
    config: ModelConfig, dtype: torch.dtype, stage: StageSpec, trained: frozenset[str]
) -> HaploVL | HaploVLForDistillation:
    """A model with random weights; only the given parts train."""
    model = HaploVLForDistillation(config, config.pre.hidden_size) if stage.has_teachers else HaploVL(config)
    initialize_weights(dict(model.named_parameters()), config.init_std, seed=0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(PART_OF[name.split(".")[0]] in trained and name not in stage.frozen)
    return model.to(dtype)


def measure_layers(
    model: HaploVL | HaploVLForDistillation, batch: Batch, recompute: str
) -> tuple[torch.Tensor, dict[str, int]]:
    """Forward, layer by layer.

    Returns:
        The loss, and the bytes that each layer keeps for backward, rotary tables not counted.
    """
    saved, measured = SavedBytes(model), {}
    inputs = model.attention_inputs(batch.kv_start_BS, batch.kv_end_BS, batch.position_ids_BS)
    x_BSD, measured["embedding"] = saved.of(lambda: model.embedding(batch))
    parts: list[tuple[str, nn.ModuleList]] = [("pre_decoder", model.pre_decoder)]
    if isinstance(model, HaploVL):
        parts.append(("post_decoder", model.post_decoder))
    for part, blocks in parts:
        if isinstance(model, HaploVL) and part == "post_decoder":
            x_BSD, measured["connector"] = saved.of(lambda x=x_BSD: model.connector(x))  # type: ignore[misc]
        for i, block in enumerate(blocks):
            assert isinstance(block, Block)
            attention = block.attention
            tables = inputs.rope(attention.head_width, attention.rope_theta, attention.rope_scaling, x_BSD.dtype)
            saved.ignore(*tables)
            x_BSD, measured[f"{part}.{i}"] = saved.of(lambda b=block, x=x_BSD: run_block(b, x, inputs, recompute))  # type: ignore[misc]
    if isinstance(model, HaploVL):
        x_BSD, measured["final_norm"] = saved.of(lambda: model.final_norm(x_BSD))
        sums, measured["lm_head"] = saved.of(lambda: model.lm_head(x_BSD, batch, next_token_loss))
        return sums["lm loss"], measured
    teacher_PD = torch.randn(batch.patch_target_P.numel(), model.distillation.vision_head.out_features).to(x_BSD.dtype)
    saved.ignore(teacher_PD)
    sums, measured["distillation"] = saved.of(
        lambda: model.distillation(x_BSD, batch, teacher_PD, model.embedding.text.weight, distillation_loss)
    )
    return sums["vision loss"] + sums["feature loss"] + sums["ctp loss"], measured


def predict_layers(
    config: ModelConfig,
    batch: Batch,
    dtype: torch.dtype,
    recompute: str,
    stage: StageSpec,
    trained: frozenset[str],
) -> dict[str, LayerCost]:
    """The planner's costs for the same batch."""
    costs = layer_costs(
        config,
        work_of_batch(batch, stage),
        Layout(recompute=recompute),
        Precision(element=dtype.itemsize, residual=dtype.itemsize, device="cpu"),
        trained=trained,
        stage=stage,
    )
    return {layer.name: layer for layer in costs}


def measure_peak(model: HaploVL, batch: Batch, recompute: str) -> int:
    """Peak bytes of one forward and backward pass, weights and gradients included. The gradients exist before the pass,
    as in any micro-batch but the first."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    inputs = model.attention_inputs(batch.kv_start_BS, batch.kv_end_BS, batch.position_ids_BS)
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        x_BSD = model.embedding(batch)
        for block in model.pre_decoder:
            assert isinstance(block, Block)
            x_BSD = run_block(block, x_BSD, inputs, recompute)
        x_BSD = model.connector(x_BSD)
        for block in model.post_decoder:
            assert isinstance(block, Block)
            x_BSD = run_block(block, x_BSD, inputs, recompute)
        loss = model.lm_head(model.final_norm(x_BSD), batch, next_token_loss)["lm loss"]
        del x_BSD
        loss.backward()
    snapshot = tracker.get_tracker_snapshot("peak")
    return int(snapshot[torch.device("cpu")]["Total"])


def predict_peak(predicted: dict[str, LayerCost], dtype: torch.dtype) -> float:
    """The peak by the planner's rule: weights, gradients, and the worst moment of backward."""
    weights = sum(layer.parameters + layer.trained_parameters for layer in predicted.values()) * dtype.itemsize
    return weights + most_held(list(predicted.values()))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the records to this file")
    arguments = parser.parse_args()
    batch = make_batch(CONFIG, (180, 210, 240, 270), 1000)
    records: list[dict[str, Any]] = []
    for dtype in (torch.bfloat16, torch.float32):
        for recompute in ("none", "selective", "full"):
            where = {"dtype": str(dtype).removeprefix("torch."), "recompute": recompute}
            _, measured = measure_layers(build(CONFIG, dtype, FINETUNE, STAGE2), batch, recompute)
            predicted = predict_layers(CONFIG, batch, dtype, recompute, FINETUNE, STAGE2)
            for name in ("embedding", "pre_decoder.1", "connector", "post_decoder.1", "final_norm", "lm_head"):
                records.append(_record({**where, "what": name}, predicted[name].saved_bytes, measured[name]))
            peak = measure_peak(_stage2(dtype), batch, recompute)
            records.append(_record({**where, "what": "peak"}, predict_peak(predicted, dtype), peak))
    print_table(records, ["dtype", "recompute", "what", "predicted_mib", "measured_mib", "error"])
    if arguments.json:
        write_json(arguments.json, records, **machine("cpu"))


def _stage2(dtype: torch.dtype) -> HaploVL:
    model = build(CONFIG, dtype, FINETUNE, STAGE2)
    assert isinstance(model, HaploVL)
    return model


def _record(where: dict[str, Any], predicted: float, measured: float) -> dict[str, Any]:
    return {
        **where,
        "predicted_mib": predicted / MIB,
        "measured_mib": measured / MIB,
        "error": predicted / measured - 1.0,
    }


if __name__ == "__main__":
    main()
