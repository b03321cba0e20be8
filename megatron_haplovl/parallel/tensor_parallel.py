"""The one table of tensor parallelism: which module of the model is split how.

It is applied from outside to a model on the meta device; the model's code knows nothing of it. `parallel/layers.py` has
what each role does. Parameters keep their names; a rank's parameter is a slice of the serial one, along the dimension
that :func:`split_dim` names, so that weights can be read, initialised and saved slice by slice.
"""

from __future__ import annotations

import re

import torch

from megatron_haplovl.model.haplovl import LayeredModel
from megatron_haplovl.parallel import layers
from megatron_haplovl.parallel.collectives import part
from megatron_haplovl.parallel.groups import Group

# Paths of modules -> role. `#` stands for the number of a block.
TENSOR_PARALLEL_ROLES = {
    "embedding.text": "vocabulary",
    "embedding.text_projector": "gathered column",
    "pre_decoder.#.attention.q_proj": "column",
    "pre_decoder.#.attention.k_proj": "column",
    "pre_decoder.#.attention.v_proj": "column",
    "pre_decoder.#.attention.o_proj": "row",
    "pre_decoder.#.mlp.gate_proj": "column",
    "pre_decoder.#.mlp.up_proj": "column",
    "pre_decoder.#.mlp.down_proj": "row",
    "connector": "gathered column",
    "post_decoder.#.attention.q_proj": "column",
    "post_decoder.#.attention.k_proj": "column",
    "post_decoder.#.attention.v_proj": "column",
    "post_decoder.#.attention.o_proj": "row",
    "post_decoder.#.mlp.gate_proj": "column",
    "post_decoder.#.mlp.up_proj": "column",
    "post_decoder.#.mlp.down_proj": "row",
    "lm_head": "vocabulary head",
    "distillation.vision_head": "gathered column",
    "distillation.text_head": "gathered column",
}
"""Everything else (norms, patch and position embedding, newline, logit scale) is whole on every rank."""

# Modules whose hidden state is whole inside and, with sequence parallelism, sharded outside.
_REGIONS = re.compile(r"(pre|post)_decoder\.#\.(attention|mlp)")

_SPLIT_DIM = {"vocabulary": 0, "vocabulary head": 0, "column": 0, "gathered column": 0, "row": 1}


def split_dim(parameter_name: str) -> int | None:
    """The dimension along which a parameter is cut; None if every rank holds it whole."""
    module, leaf = parameter_name.rsplit(".", 1)
    role = TENSOR_PARALLEL_ROLES.get(_pattern(module))
    if role is None or (role == "row" and leaf == "bias"):
        return None
    return _SPLIT_DIM[role]


def apply_tensor_parallel(model: LayeredModel, group: Group, *, sequence_parallel: bool) -> None:
    """Turn the serial model, on the meta device, into this rank's part of it.

    Args:
        model: the model of either stage.
        group: the tensor-parallel ranks.
        sequence_parallel: shard the hidden state along the sequence wherever no matrix is split.
    """
    if group.size == 1:
        return
    for path, module in model.named_modules():
        pattern = _pattern(path)
        match TENSOR_PARALLEL_ROLES.get(pattern):
            case "column":
                layers.column(module, group)
            case "row":
                layers.row(module, group, sequence_parallel)
            case "gathered column":
                # The projector comes before the sequence is sharded, the heads after it is gathered.
                layers.gathered_column(module, group, sequence_parallel and pattern == "connector")
            case "vocabulary":
                layers.vocabulary(module, group)
            case "vocabulary head":
                layers.cut(module, "weight", group, 0)
        if _REGIONS.fullmatch(pattern):
            layers.enter(module, group, sequence_parallel)
        if sequence_parallel and pattern == "embedding":
            layers.scatter_sequence(module, group)
        if sequence_parallel and pattern == model.HEAD:
            layers.gather_sequence(module, group)


def finish_tensor_parallel(model: LayeredModel, group: Group, *, sequence_parallel: bool) -> None:
    """Mark the parameters once they are allocated.

    A split parameter is marked for DeepSpeed, which then counts it on every rank in the gradient norm. A whole one that
    works on a sharded sequence gets a hook that sums its gradient.
    """
    if group.size == 1:
        return
    for name, parameter in model.named_parameters():
        if split_dim(name) is not None:
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        elif sequence_parallel and parameter.requires_grad and _is_on_sharded_sequence(name, model.HEAD):
            layers.sum_gradient(parameter, group)


def local_part(name: str, whole: torch.Tensor, group: Group) -> torch.Tensor:
    """This rank's slice of a parameter's serial value."""
    dim = split_dim(name)
    return whole if dim is None else part(whole, group, dim)


def _pattern(path: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".#", path)


def _is_on_sharded_sequence(name: str, head: str) -> bool:
    """Whether a whole parameter works on the sharded sequence: everything between embedding and head."""
    return not name.startswith(("embedding.", f"{head}."))
