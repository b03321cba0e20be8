"""Where every weight of a new run comes from: a checkpoint, a pretrained model, or a random stream."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch

from megatron_haplovl.checkpoint.find import find_checkpoint
from megatron_haplovl.checkpoint.pieces import open_checkpoint
from megatron_haplovl.config.allowed import Allowed
from megatron_haplovl.config.files import read_config
from megatron_haplovl.config.schema import Config, ModelConfig
from megatron_haplovl.config.stages import STAGES, StageSpec
from megatron_haplovl.conversion.hf_sources import MappedWeights, open_language_model, open_vision_tower
from megatron_haplovl.conversion.provenance import MAY_BE_NEW, NEW, provenance_table
from megatron_haplovl.model.initialization import initial_value
from megatron_haplovl.parallel.sharded_model import ShardedModel
from megatron_haplovl.parallel.tensor_parallel import local_part


def fill_weights(model: ShardedModel, config: Config, resumed: Path | None = None) -> str:
    """Give every parameter of this rank its value, or this rank's slice of it. Called by every rank.

    A later source wins: `--vision-teacher`, `--language-model`, `--pretrained-checkpoint` (or
    `--load` with `--finetune`). A parameter that none of them has starts at random if `MAY_BE_NEW` or
    --allow-missing names it, or if the run is on mock data without a checkpoint.

    Args:
        model: this rank's part of the model.
        config: the run's settings.
        resumed: the checkpoint of a run that goes on; if given, it has all weights.

    Returns:
        A table that says where the tensors of every part of the model came from, and what was dropped or skipped.

    Raises:
        ValueError: a damaged checkpoint; a tensor of the wrong shape; or a tensor that the model or every source lacks,
            if --allow-unexpected or --allow-missing does not name it.
    """
    pretrained: Path | None = None
    if resumed is None and config.weights_from is not None:
        fallback = config.checkpoint.finetune and config.checkpoint.allow_fallback
        pretrained = find_checkpoint(config.weights_from, model.groups.world, allow_fallback=fallback, is_ours=False)
    to = _Destination(model)

    def copy_all() -> None:
        if resumed is None:
            _copy_sources(to, config, pretrained)
        else:
            _copy_resumed(to, resumed, config.model)

    # A file that is missing or broken may be read on one stage only.
    model.groups.world.together(copy_all)
    stages = model.groups.pipeline.gather_objects(to.source_of)
    merged = {name: source for stage in stages for name, source in stage.items()}
    source_of = {name: merged[name] for name in model.shapes}
    if not config.data.mock_data or resumed is not None or pretrained is not None:
        _refuse_missing(source_of, _allowed(config))
    for name, parameter in to.parameters.items():
        if source_of[name] == NEW:
            whole = initial_value(name, model.shapes[name], config.model.init_std, config.run.seed)
            with torch.no_grad():
                parameter.copy_(local_part(name, whole, model.groups.tensor))
    return "\n".join(["initial weights:", provenance_table([*source_of.items(), *to.left])])


class _Destination:
    """This rank's parameters while they are filled, and where each came from."""

    def __init__(self, model: ShardedModel) -> None:
        self.shapes = model.shapes
        self.parameters = dict(model.module.named_parameters())
        self.source_of = dict.fromkeys(self.parameters, NEW)
        self.left: list[tuple[str, str]] = []
        """Tensors of the files that were left out, with the reason."""
        self._tensor = model.groups.tensor

    def copy(self, weights: Iterable[tuple[str, torch.Tensor]], source: str) -> None:
        """Copy tensors one at a time, so that memory never holds more than one whole tensor."""
        for name, tensor in weights:
            if name not in self.shapes:
                raise ValueError(
                    f"{source}: the model has no parameter {name!r} (shape {list(tensor.shape)}); --allow-unexpected "
                    "skips those that it names"
                )
            if tensor.shape != self.shapes[name]:
                raise ValueError(
                    f"{source}: {name} has shape {list(tensor.shape)}, the model expects {list(self.shapes[name])}; "
                    "check --model and the size flags"
                )
            if name in self.parameters:
                with torch.no_grad():
                    self.parameters[name].copy_(local_part(name, tensor, self._tensor))
                self.source_of[name] = source

    def copy_mapped(self, weights: MappedWeights, without: tuple[str, ...] = ()) -> None:
        """Copy the tensors of a Hugging Face folder."""
        wanted = [name for name in weights.names() if name in self.parameters and name not in without]
        self.copy(((name, weights.get(name)) for name in wanted), str(weights.folder))
        self.source_of.update((name, weights.origin(name)) for name in wanted)
        self.left.extend(weights.skipped)


def _copy_resumed(to: _Destination, resumed: Path, model: ModelConfig) -> None:
    """Copy the weights of a run that goes on."""
    _check_same_model(resumed, model)
    if (was := read_config(resumed).model.image_attention) != model.image_attention:
        raise ValueError(f"{resumed} was trained with --image-attention {was}; make the run agree")
    saved = open_checkpoint(resumed)
    if missing := sorted(to.shapes.keys() - set(saved.names())):
        raise ValueError(f"{resumed} has no {missing[0]!r} ({len(missing)} tensors are missing)")
    if unexpected := sorted(set(saved.names()) - to.shapes.keys()):
        raise ValueError(f"{resumed} has {unexpected[0]!r}, the model has not ({len(unexpected)} tensors)")
    to.copy(((name, saved.get(name)) for name in saved.names() if name in to.parameters), str(resumed))


def _copy_sources(to: _Destination, config: Config, pretrained: Path | None) -> None:
    """Copy what a new run starts from; a later source wins."""
    init, allow = config.init, _allowed(config)
    if init.vision_teacher is not None:
        to.copy_mapped(open_vision_tower(init.vision_teacher, config.model, allow))
    if init.language_model is not None:
        weights = open_language_model(init.language_model, config.model, allow, stage=config.stage)
        to.copy_mapped(weights, ("embedding.text.weight",) if config.model.text_embedding == "folded" else ())
    if pretrained is not None:
        _check_same_model(pretrained, config.model)
        reader = open_checkpoint(pretrained)
        foreign = [name for name in reader.names() if name not in to.shapes]
        reasons = {name: _reason_to_leave(name, config.stage, allow) for name in foreign}
        to.left += [(name, reason) for name, reason in reasons.items() if reason is not None]
        ours = (name for name in reader.names() if name in to.parameters or reasons.get(name, "") is None)
        to.copy(((name, reader.get(name)) for name in ours), str(pretrained))


def _reason_to_leave(name: str, stage: StageSpec, allow: Allowed) -> str | None:
    """Why a checkpoint's tensor may be left out if the model has no place for it.

    Stage 2 drops stage 1's heads (paper Sec. 3.2: "we keep the pre-decoder, while discarding the heads"), and stage 1
    can start from a checkpoint of the whole model.
    """
    layer = name.partition(".")[0]
    owners = [other.title for other in STAGES.values() if layer in other.layers]
    if owners and layer not in stage.layers:
        return f"dropped: {' and '.join(owners)} only"
    return "skipped: --allow-unexpected" if allow.skips(name) else None


def _allowed(config: Config) -> Allowed:
    return Allowed(config.init.allow_missing, config.init.allow_unexpected)


def _check_same_model(folder: Path, model: ModelConfig) -> None:
    """Refuse differences that shapes do not show: heads, activations, rotary bases and the like."""
    theirs = read_config(folder).model
    if theirs.text_embedding != model.text_embedding:
        raise ValueError(
            f"{folder} needs --text-embedding {theirs.text_embedding}, this run has {model.text_embedding}"
        )
    for section, names in (("pre", None), ("post", None), ("vision", ("patch_size", "image_size"))):
        for name, value in vars(getattr(model, section)).items():
            was = getattr(getattr(theirs, section), name)
            if was != value and (names is None or name in names):
                prefix = "" if section == "vision" else f"{section}-"
                raise ValueError(
                    f"{folder} was trained with --{prefix}{name.replace('_', '-')} {was}, this run has {value}; make "
                    "them agree"
                )


def _refuse_missing(source_of: dict[str, str], allow: Allowed) -> None:
    for pattern in allow.missing:
        if not any(re.fullmatch(pattern, name) for name in source_of):
            raise ValueError(
                f"--allow-missing {pattern}: no parameter of this model has a name that is wholly matched; names are "
                r"such as lm_head.weight and post_decoder.0.mlp.up_proj.weight, patterns such as post_decoder\..*"
            )
    new = [name for name, source in source_of.items() if source == NEW]
    missing = [name for name in new if not (MAY_BE_NEW.fullmatch(name) or allow.lacks(name))]
    if missing:
        parts = sorted({name.split(".", 1)[0] for name in missing})
        raise ValueError(
            f"no weights for {', '.join(parts)} ({len(missing)} tensors, such as {missing[0]!r}); give "
            "--pretrained-checkpoint, --language-model (text embedding, post-decoder, head) or --vision-teacher "
            "(patch embedding, pre-decoder), or let them start at random with --allow-missing"
        )
