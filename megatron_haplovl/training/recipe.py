"""What trains, and how fast: from a recipe and freeze flags to the optimizer's parameter groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from megatron_haplovl.config.schema import OptimizerConfig, RecipeConfig
from megatron_haplovl.config.stages import FREEZABLE, PART_OF, RECIPES
from megatron_haplovl.parallel.sharded_model import ShardedModel


def part_of(parameter: str) -> str:
    """The part of the model that a parameter belongs to."""
    return PART_OF[parameter.split(".", 1)[0]]


def trained_parts(config: RecipeConfig) -> frozenset[str]:
    """Parts that a recipe trains, without those that the freeze flags freeze."""
    frozen = {part for part in FREEZABLE if getattr(config, f"freeze_{part}")}
    return RECIPES[config.recipe].trains - frozen


def is_trained(parameter: str, config: RecipeConfig) -> bool:
    """Whether a recipe trains the parameter of this name."""
    return part_of(parameter) in trained_parts(config) and parameter not in RECIPES[config.recipe].stage.frozen


def apply_recipe(model: nn.Module, config: RecipeConfig) -> None:
    """Set `requires_grad` of every parameter.

    Raises:
        ValueError: nothing is left to train.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, config))
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"recipe {config.recipe!r} with these freeze flags leaves nothing to train")


def optimizer_groups(model: ShardedModel, optimizer: OptimizerConfig, recipe: RecipeConfig) -> list[dict[str, Any]]:
    """The groups of this rank's parameters; see :func:`parameter_groups`.

    Raises:
        ValueError: a learning rate for a part that is not trained.
    """
    if model.stages is None:
        return parameter_groups(model.module, optimizer)
    of_all_stages = {name: len(shape) for name, shape in model.shapes.items() if is_trained(name, recipe)}
    return parameter_groups(model.module, optimizer, trained=of_all_stages)


def parameter_groups(
    model: nn.Module, config: OptimizerConfig, *, trained: Mapping[str, int] | None = None
) -> list[dict[str, Any]]:
    """The optimizer's groups: one per part of the model and kind of weight decay.

    Matrices decay; norms, biases and other one-dimensional parameters do not. Each group carries `lr_ratio`, its peak
    learning rate over `--lr`, so that one schedule serves all.

    Args:
        model: its parameters that require a gradient are grouped.
        config: rates and decay.
        trained: if the model is a pipeline stage, names and numbers of dimensions of all stages' trained parameters.
            Every stage then has every group, some of them empty.

    Raises:
        ValueError: a learning rate for a part that is not trained.
    """
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, ndim in (trained or {name: parameter.ndim for name, parameter in own.items()}).items():
        part, decays = part_of(name), ndim >= 2
        if (part, decays) not in groups:
            peak = getattr(config, f"{part}_lr", None)
            groups[part, decays] = {
                "name": f"{part}{'' if decays else ' (no decay)'}",
                "params": [],
                "lr": config.lr,
                "lr_ratio": 1.0 if peak is None else peak / config.lr,
                "weight_decay": config.weight_decay if decays else 0.0,
            }
        if name in own:
            groups[part, decays]["params"].append(own[name])
    for part in FREEZABLE:
        if getattr(config, f"{part}_lr") is not None and (part, True) not in groups:
            raise ValueError(f"--{part.replace('_', '-')}-lr is given, but this run does not train that part")
    # DeepSpeed reduces group after group, copying together what is small; the post-decoder's matrices come first and
    # alone (`planning.engine_memory`).
    matrices_first = sorted(reversed(groups), key=lambda key: not key[1])
    return [groups[key] for key in matrices_first]
