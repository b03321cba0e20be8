"""Where every weight of a new run comes from: a checkpoint, a pretrained model, or a random stream."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from megatron_haplovl.checkpoint.hf_mapping import load_language_model, load_vision_model
from megatron_haplovl.checkpoint.weights import WeightReader, read_config, resolve_checkpoint
from megatron_haplovl.config.schema import Config, ModelConfig
from megatron_haplovl.model.initialization import initial_value
from megatron_haplovl.parallel.groups import Group
from megatron_haplovl.parallel.plan import local_part, whole_shape

_NEW = "newly initialised"

# What no pretrained model holds, so that it may start at random beside pretrained weights.
_MAY_BE_NEW = re.compile(r"embedding\.(text_projector\.weight|image_newline)|connector\.weight|distillation\..*")

# What stage 1 leaves behind (paper Sec. 3.2: "we keep the pre-decoder, while discarding the heads").
_DROPPED = re.compile(r"distillation\..*")


def fill_weights(model: nn.Module, config: Config, tensor_group: Group) -> str:
    """Give every parameter its initial value, or this rank's slice of it.

    A later source wins: `--vision-teacher`, `--language-model`, `--pretrained-checkpoint`. What is in none of them
    starts at random.

    Returns:
        A table that says for every part of the model where its tensors came from, and what was dropped.

    Raises:
        ValueError: a tensor of the wrong shape, one that the model does not have, or one that should have been
            inherited and is in no source.
    """
    parameters = dict(model.named_parameters())
    source_of = dict.fromkeys(parameters, _NEW)
    init = config.init
    if init.vision_teacher is not None:
        weights = load_vision_model(init.vision_teacher, config.model)
        _copy(weights, parameters, source_of, init.vision_teacher, tensor_group)
    if init.language_model is not None:
        embedding_only = not any(name.startswith("post_decoder.") for name in parameters)
        weights = load_language_model(init.language_model, config.model, embedding_only=embedding_only)
        if config.model.text_embedding == "folded":
            weights = ((name, tensor) for name, tensor in weights if name != "embedding.text.weight")
        _copy(weights, parameters, source_of, init.language_model, tensor_group)
    dropped: list[str] = []
    if init.pretrained_checkpoint is not None:
        folder = resolve_checkpoint(init.pretrained_checkpoint)
        dropped = _copy_checkpoint(folder, config.model, parameters, source_of, tensor_group)
    if not config.data.mock_data:
        _refuse_missing(source_of)
    for name, parameter in parameters.items():
        if source_of[name] == _NEW:
            shape = whole_shape(name, parameter.shape, tensor_group)
            whole = initial_value(name, shape, config.model.init_std, config.run.seed)
            with torch.no_grad():
                parameter.copy_(local_part(name, whole, tensor_group))
    return _report(source_of, dropped)


def _copy(
    weights: Iterable[tuple[str, torch.Tensor]],
    parameters: dict[str, nn.Parameter],
    source_of: dict[str, str],
    source: str,
    tensor_group: Group,
) -> None:
    """Copy tensors one at a time, so that no more than one is there whole."""
    for name, tensor in weights:
        if name not in parameters:
            raise ValueError(f"{source}: the model has no parameter {name!r} (shape {list(tensor.shape)})")
        expected = whole_shape(name, parameters[name].shape, tensor_group)
        if tensor.shape != expected:
            raise ValueError(
                f"{source}: {name} has shape {list(tensor.shape)}, the model expects {list(expected)}; "
                "check --model and the size flags"
            )
        with torch.no_grad():
            parameters[name].copy_(local_part(name, tensor, tensor_group))
        source_of[name] = source


def _check_same_model(folder: Path, model: ModelConfig) -> None:
    """Refuse what shapes do not show: heads, activations, rotary bases and the like."""
    theirs = read_config(folder).model
    for section, names in (("pre", None), ("post", None), ("vision", ("patch_size", "image_size"))):
        for name, value in vars(getattr(model, section)).items():
            was = getattr(getattr(theirs, section), name)
            if was != value and (names is None or name in names):
                prefix = "" if section == "vision" else f"{section}-"
                raise ValueError(
                    f"{folder} was trained with --{prefix}{name.replace('_', '-')} {was}, this run has {value}; make "
                    "them agree"
                )


def _copy_checkpoint(
    folder: Path,
    model: ModelConfig,
    parameters: dict[str, nn.Parameter],
    source_of: dict[str, str],
    tensor_group: Group,
) -> list[str]:
    """Copy a training checkpoint's weights; returns the names that were left out on purpose."""
    _check_same_model(folder, model)
    reader = WeightReader(folder)
    dropped = [name for name in reader.names() if name not in parameters and _DROPPED.fullmatch(name)]
    kept = ((name, reader.get(name)) for name in reader.names() if name not in dropped)
    _copy(kept, parameters, source_of, str(folder), tensor_group)
    return dropped


def _refuse_missing(source_of: dict[str, str]) -> None:
    missing = [name for name, source in source_of.items() if source == _NEW and not _MAY_BE_NEW.fullmatch(name)]
    if missing:
        parts = sorted({name.split(".", 1)[0] for name in missing})
        raise ValueError(
            f"no weights for {', '.join(parts)} ({len(missing)} tensors, such as {missing[0]!r}); give "
            "--pretrained-checkpoint, --language-model (text embedding, post-decoder, head) or --vision-teacher "
            "(patch embedding, pre-decoder)"
        )


def _report(source_of: dict[str, str], dropped: list[str]) -> str:
    rows = Counter((name.split(".", 1)[0], source) for name, source in source_of.items())
    rows.update((name.split(".", 1)[0], "dropped: stage 1 only") for name in dropped)
    width = max(len(part) for part, _ in rows)
    lines = [f"  {part:<{width}}  {count:>5} tensors  {source}" for (part, source), count in rows.items()]
    return "\n".join(["initial weights:", *lines])
