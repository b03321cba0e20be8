"""The stages of the training and their recipes, as far as settings and planning need to know them.

`training.stages` says how a stage is built; here is what a recipe trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

PART_OF: Mapping[str, str] = MappingProxyType(
    {
        "embedding": "embedding",
        "pre_decoder": "pre_decoder",
        "connector": "connector",
        "post_decoder": "post_decoder",
        "final_norm": "post_decoder",
        "lm_head": "post_decoder",
        "distillation": "distillation",
    }
)
"""First word of a layer's name -> the part of the model, as recipes, freeze flags and learning rates name it."""

FREEZABLE = ("embedding", "pre_decoder", "connector", "post_decoder")
"""Parts with a --freeze flag and a learning rate of their own."""


@dataclass(frozen=True)
class StageSpec:
    """One stage of the training (paper Sec. 3.2)."""

    name: str
    """The stage is started as `megatron_haplovl.<name>`; stages 1 and 2 also by a script `<name>_haplovl.py`."""
    title: str
    """The stage's name in messages."""
    layers: tuple[str, ...]
    """First words of the layers' names, in the order of the flat layer list. The last layer is the head."""
    head_tokens: str
    """Field of `data.batch.StepCounts`: the tokens whose vocabulary logits are computed."""
    defaults: Mapping[str, Any]
    """Settings (`section.field`) that differ from the schema's defaults: the paper's."""
    frozen: frozenset[str] = frozenset()
    """Parameters that no recipe of the stage trains."""
    has_teachers: bool = False
    """Whether the stage distils a vision teacher and the language model's embedding."""
    own_settings: tuple[str, ...] = ()
    """Settings (`section.field`, or a whole `section`) that no other stage reads."""

    @property
    def parts(self) -> frozenset[str]:
        """The parts of the model that the stage has."""
        return frozenset(PART_OF[layer] for layer in self.layers)


PRETRAIN = StageSpec(
    name="pretrain",
    title="stage 1",
    layers=("embedding", "pre_decoder", "distillation"),
    head_tokens="text_tokens",
    # Paper Table 8 and Sec. 4.1.
    defaults={
        "recipe.recipe": "distill",
        "optimizer.lr": 1e-4,
        "optimizer.adam_beta1": 0.9,
        "optimizer.adam_beta2": 0.95,
        "optimizer.weight_decay": 1e-4,
        "schedule.global_batch_size": 256,
        "schedule.train_iters": 40000,
        "schedule.lr_warmup_iters": 2000,
    },
    # The text head is taught the language model's own matrix W, so W must not move (paper Sec. 3.2).
    frozen=frozenset({"embedding.text.weight"}),
    has_teachers=True,
    own_settings=("data.aux_data_path", "init.teacher_layer", "loss"),
)
FINETUNE = StageSpec(
    name="finetune",
    title="stage 2",
    layers=("embedding", "pre_decoder", "connector", "post_decoder", "final_norm", "lm_head"),
    head_tokens="lm_tokens",
    # Paper Table 9 and Sec. 4.1.
    defaults={
        "recipe.recipe": "full",
        "optimizer.lr": 2e-5,
        "optimizer.adam_beta1": 0.9,
        "optimizer.adam_beta2": 0.98,
        "optimizer.weight_decay": 0.0,
        "schedule.global_batch_size": 128,
        "schedule.train_iters": 30000,
        "schedule.lr_warmup_iters": 0,
    },
    # Stage 1 has no output head, so it has no answers.
    own_settings=(
        *("logging.sample_questions", "logging.sample_image_folder", "logging.sample_interval"),
        *("logging.sample_max_new_tokens", "logging.sample_chat_template"),
    ),
)
STAGES: Mapping[str, StageSpec] = MappingProxyType({stage.name: stage for stage in (PRETRAIN, FINETUNE)})


@dataclass(frozen=True)
class RecipeSpec:
    """What one --recipe trains."""

    stage: StageSpec
    trains: frozenset[str]
    """Parts of the model, see PART_OF."""
    help: str = field(compare=False)


RECIPES: Mapping[str, RecipeSpec] = MappingProxyType(
    {
        "distill": RecipeSpec(PRETRAIN, PRETRAIN.parts, "stage 1, the pre-decoder against its teachers"),
        "align": RecipeSpec(FINETUNE, frozenset({"connector"}), "stage 2, the connector only"),
        "full": RecipeSpec(FINETUNE, FINETUNE.parts, "stage 2, everything"),
    }
)
"""--recipe -> what it trains."""


def recipes_of(stage: StageSpec) -> tuple[str, ...]:
    """The recipes that an entry script takes."""
    return tuple(name for name, recipe in RECIPES.items() if recipe.stage == stage)
