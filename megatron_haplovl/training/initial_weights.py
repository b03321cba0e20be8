"""Where every weight of a new run comes from: a checkpoint, a pretrained model, or a random stream."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from megatron_haplovl.checkpoint.hf_mapping import load_language_model, load_vision_model
from megatron_haplovl.checkpoint.pieces import open_checkpoint
from megatron_haplovl.checkpoint.weights import read_config, resolve_checkpoint
from megatron_haplovl.config.schema import Config, ModelConfig
from megatron_haplovl.model.initialization import initial_value
from megatron_haplovl.parallel.plan import local_part
from megatron_haplovl.parallel.sharded_model import ShardedModel

_NEW = "newly initialised"

# What no pretrained model holds, so that it may start at random beside pretrained weights.
_MAY_BE_NEW = re.compile(r"embedding\.(text_projector\.weight|image_newline)|connector\.weight|distillation\..*")

# What stage 1 leaves behind (paper Sec. 3.2: "we keep the pre-decoder, while discarding the heads").
_DROPPED = re.compile(r"distillation\..*")


def fill_weights(model: ShardedModel, config: Config, resumed: Path | None = None) -> str:
    """Give every parameter of this rank its value, or its slice of it. Called by every rank.

    A later source wins: `--vision-teacher`, `--language-model`, `--pretrained-checkpoint`. What is in none of them
    starts at random.

    Args:
        model: this rank's part of it.
        config: the run's settings.
        resumed: the checkpoint of a run that goes on; then all weights are in it.

    Returns:
        A table that says for every part of the model where its tensors came from, and what was dropped.

    Raises:
        ValueError: a tensor of the wrong shape, one that the model does not have, or one that should have been
            inherited and is in no source.
    """
    parameters = dict(model.module.named_parameters())
    # A file that is missing or broken may be read on one stage only.
    own_sources, dropped = model.groups.world.together(lambda: _copy_sources(model, config, parameters, resumed))
    stages = model.groups.pipeline.gather_objects(own_sources)
    merged = {name: source for stage in stages for name, source in stage.items()}
    source_of = {name: merged[name] for name in model.shapes}
    if not config.data.mock_data or resumed is not None:
        _refuse_missing(source_of)
    for name, parameter in parameters.items():
        if source_of[name] == _NEW:
            whole = initial_value(name, model.shapes[name], config.model.init_std, config.run.seed)
            with torch.no_grad():
                parameter.copy_(local_part(name, whole, model.groups.tensor))
    return _report(source_of, dropped)


def _copy_sources(
    model: ShardedModel, config: Config, parameters: dict[str, torch.nn.Parameter], resumed: Path | None
) -> tuple[dict[str, str], list[str]]:
    """Fill this rank's parameters from files.

    Returns:
        Where each came from, and what was left out on purpose.
    """
    source_of = dict.fromkeys(parameters, _NEW)

    def copy(weights: Iterable[tuple[str, torch.Tensor]], source: str) -> None:
        """Copy tensors one at a time, so that no more than one is there whole."""
        for name, tensor in weights:
            if name not in model.shapes:
                raise ValueError(f"{source}: the model has no parameter {name!r} (shape {list(tensor.shape)})")
            if tensor.shape != model.shapes[name]:
                raise ValueError(
                    f"{source}: {name} has shape {list(tensor.shape)}, the model expects {list(model.shapes[name])}; "
                    "check --model and the size flags"
                )
            if name in parameters:
                with torch.no_grad():
                    parameters[name].copy_(local_part(name, tensor, model.groups.tensor))
                source_of[name] = source

    init = config.init
    if resumed is not None:
        _check_same_model(resumed, config.model)
        saved = open_checkpoint(resumed)
        if missing := sorted(model.shapes.keys() - set(saved.names())):
            raise ValueError(f"{resumed} has no {missing[0]!r} ({len(missing)} tensors are missing)")
        copy(((name, saved.get(name)) for name in saved.names() if name in parameters), str(resumed))
        return source_of, []
    if init.vision_teacher is not None:
        copy(load_vision_model(init.vision_teacher, config.model, only=parameters), init.vision_teacher)
    if init.language_model is not None:
        stage1 = not any(name.startswith("post_decoder.") for name in model.shapes)
        weights = load_language_model(init.language_model, config.model, embedding_only=stage1, only=parameters)
        if config.model.text_embedding == "folded":
            weights = ((name, tensor) for name, tensor in weights if name != "embedding.text.weight")
        copy(weights, init.language_model)
    dropped: list[str] = []
    if init.pretrained_checkpoint is not None:
        folder = resolve_checkpoint(init.pretrained_checkpoint)
        _check_same_model(folder, config.model)
        reader = open_checkpoint(folder)
        dropped = [name for name in reader.names() if name not in model.shapes and _DROPPED.fullmatch(name)]
        ours = (name for name in reader.names() if name in parameters or name not in (*model.shapes, *dropped))
        copy(((name, reader.get(name)) for name in ours), str(folder))
    return source_of, dropped


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
