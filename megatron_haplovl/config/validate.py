"""Checks that need more than one setting. Each error names the flags and says what to change."""

from __future__ import annotations

from megatron_haplovl.config.allowed import Allowed
from megatron_haplovl.config.batch_schedule import BatchSchedule
from megatron_haplovl.config.bounds import check_at_least_1
from megatron_haplovl.config.layout import Layout, Workload, check_layout, check_levels
from megatron_haplovl.config.mixture import parse_split
from megatron_haplovl.config.schema import Config, ModelConfig, RopeScalingConfig
from megatron_haplovl.config.stages import FREEZABLE, STAGES
from megatron_haplovl.config.validate_checkpoint import validate_checkpoint
from megatron_haplovl.config.validate_guard import validate_guard
from megatron_haplovl.config.validate_profile import validate_profile
from megatron_haplovl.config.vision import VisionConfig


def validate(config: Config) -> None:
    """Check a configuration as far as that is possible without looking at files or at the process group.

    Raises:
        ValueError: the first contradiction found.
    """
    validate_model(config.model)
    _validate_schedule(config)
    _validate_data(config)
    validate_checkpoint(config)
    Allowed(config.init.allow_missing, config.init.allow_unexpected)
    _validate_recipe(config)
    _validate_samples(config)
    _validate_parallel(config)
    validate_profile(config)
    validate_guard(config)


def validate_model(model: ModelConfig) -> None:
    """Check the sizes of a model.

    Raises:
        ValueError: sizes that do not divide.
    """
    _positive_sizes(model)
    vision, pre, post = model.vision, model.pre, model.post
    if vision.image_size % vision.patch_size:
        raise ValueError(f"--image-size {vision.image_size} is not a multiple of --patch-size {vision.patch_size}")
    if vision.image_aspect_ratio == "anyres" and vision.max_tiles < 2:
        raise ValueError(f"--image-aspect-ratio anyres needs --max-tiles of at least 2, got {vision.max_tiles}")
    _check_image_token_budget(vision)
    for name, decoder in (("pre", pre), ("post", post)):
        if decoder.hidden_size % decoder.num_attention_heads:
            raise ValueError(
                f"--{name}-hidden-size {decoder.hidden_size} is not a multiple of "
                f"--{name}-num-attention-heads {decoder.num_attention_heads}"
            )
        if (decoder.hidden_size // decoder.num_attention_heads) % 2:
            raise ValueError(
                f"--{name}-hidden-size / --{name}-num-attention-heads = "
                f"{decoder.hidden_size // decoder.num_attention_heads} is odd; RoPE rotates pairs"
            )
    _check_rope_scaling(post.rope_scaling)
    if post.num_attention_heads % post.num_key_value_heads:
        raise ValueError(
            f"--post-num-attention-heads {post.num_attention_heads} is not a multiple of "
            f"--post-num-key-value-heads {post.num_key_value_heads}"
        )


def _check_image_token_budget(vision: VisionConfig) -> None:
    budget = vision.image_token_budget
    if budget is None:
        return
    if vision.image_aspect_ratio != "anyres":
        raise ValueError(
            f"--image-token-budget {budget} shares tiles out among several images, and with --image-aspect-ratio "
            f"{vision.image_aspect_ratio} every image has one; leave it out, or use anyres"
        )
    if budget < vision.cells_per_tile:
        raise ValueError(
            f"--image-token-budget {budget} is less than the {vision.cells_per_tile} patches of one tile, which every "
            "image has at least; raise it, or leave it out for one tile each"
        )


def _check_rope_scaling(scaling: RopeScalingConfig) -> None:
    flag = "--post-rope-scaling"
    if scaling.type == "none" and scaling != RopeScalingConfig():
        raise ValueError(f"{flag}-type none scales nothing; leave the other {flag} flags out, or give a type")
    if scaling.factor < 1:
        raise ValueError(f"{flag}-factor must be at least 1, got {scaling.factor}")
    if not 0 < scaling.low_freq_factor < scaling.high_freq_factor:
        raise ValueError(
            f"{flag}-low-freq-factor {scaling.low_freq_factor} must be above 0 and below {flag}-high-freq-factor "
            f"{scaling.high_freq_factor}"
        )


def _positive_sizes(model: ModelConfig) -> None:
    for prefix, section in (
        ("", model.vision),
        ("pre-", model.pre),
        ("post-", model.post),
        ("post-rope-scaling-", model.post.rope_scaling),
        ("", model),
    ):
        for name, value in vars(section).items():
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ValueError(f"--{prefix}{name.replace('_', '-')} must be at least 1, got {value}")


def _validate_schedule(config: Config) -> None:
    schedule = config.schedule
    check_at_least_1(schedule, "train_iters", "train_samples", "micro_batch_size", "global_batch_size")
    batches = BatchSchedule.of(schedule)
    if schedule.batch_unit == "packs":
        if schedule.global_batch_size % schedule.micro_batch_size:
            raise ValueError(
                f"--global-batch-size {schedule.global_batch_size} is not a multiple of "
                f"--micro-batch-size {schedule.micro_batch_size}"
            )
        sentence = check_levels(batches, schedule.micro_batch_size)
        if sentence is not None:
            raise ValueError(sentence)
    _validate_learning_rate(config)
    if config.optimizer.adamw_implementation == "apex" and config.parallel.offload_optimizer == "cpu":
        raise ValueError(
            "--adamw-implementation apex steps on a GPU, and --offload-optimizer cpu on the host; use auto, deepspeed "
            "or torch"
        )
    check_at_least_1(config.parallel, "distributed_timeout_minutes", "distributed_timeout_seconds_after_init")
    check_at_least_1(config.data, "loader_timeout_seconds")
    check_at_least_1(
        config.logging, "log_interval", "eval_interval", "eval_iters", "sample_interval", "sample_max_new_tokens"
    )


def _validate_learning_rate(config: Config) -> None:
    schedule = config.schedule
    for name in ("lr_warmup", "lr_decay"):
        value, flag = getattr(schedule, f"{name}_samples"), f"--{name.replace('_', '-')}"
        if value is not None and schedule.train_samples is None:
            raise ValueError(f"{flag}-samples {value} needs --train-samples; give that, or {flag}-iters")
    counted = schedule.counted_in
    what = "steps" if counted == "iters" else counted
    if not 0 <= schedule.warmup < schedule.decay_end:
        raise ValueError(
            f"--lr-warmup-{counted} {schedule.warmup} must be at least 0 and less than the {schedule.decay_end} "
            f"{what} of --lr-decay-{counted} (default: --train-{counted})"
        )
    has_end = schedule.lr_decay_iters is not None or schedule.lr_decay_samples is not None
    if schedule.lr_decay_style == "constant" and (has_end or config.optimizer.min_lr):
        raise ValueError(f"--lr-decay-style constant never decays; leave out --lr-decay-{counted} and --min-lr")
    if config.optimizer.min_lr > config.optimizer.lr:
        raise ValueError(f"--min-lr {config.optimizer.min_lr} is larger than --lr {config.optimizer.lr}")


def _validate_data(config: Config) -> None:
    data = config.data
    if data.skip_bad_samples < 0:
        raise ValueError(f"--skip-bad-samples {data.skip_bad_samples} is negative; 0 skips none")
    by_flags = data.data_path or data.aux_data_path or data.valid_data_path
    if data.mock_data and by_flags:
        raise ValueError("--mock-data reads no files; leave out --data-path, --aux-data-path and --valid-data-path")
    if data.mock_data and (data.data_config is not None or data.split is not None):
        raise ValueError("--mock-data reads no files; leave out --data-config and --split")
    if data.data_config is not None and by_flags:
        raise ValueError(
            f"--data-config {data.data_config} names all sources; leave out --data-path, --aux-data-path and "
            "--valid-data-path"
        )
    if data.data_var and data.data_config is None:
        raise ValueError("--data-var is for the paths of --data-config; give that, or leave it out")
    if data.split is not None:
        parse_split(data.split)
        if data.valid_data_path:
            raise ValueError("--split and --valid-data-path both say what is held out; keep one of them")
    if not data.mock_data and not data.data_path and data.data_config is None:
        raise ValueError(
            "nothing to train on: give --data-path PREFIX (see haplovl-preprocess), --data-config YAML or --mock-data"
        )
    # Whether a mixture holds something out is known when it is read.
    if config.logging.eval_interval is not None and not (data.valid_data_path or data.split or data.data_config):
        raise ValueError("--eval-interval needs --valid-data-path, --split or --data-config")


def _validate_samples(config: Config) -> None:
    logging, defaults = config.logging, Config().logging
    if logging.sample_questions is None:
        for name in ("sample_image_folder", "sample_interval", "sample_max_new_tokens", "sample_chat_template"):
            if getattr(logging, name) != getattr(defaults, name):
                raise ValueError(f"--{name.replace('_', '-')} is about --sample-questions; give that, or leave it out")
    elif config.data.tokenizer_model is None:
        raise ValueError(
            "--sample-questions needs --tokenizer-model: the tokenizer makes tokens of a question and a text of the "
            "answer"
        )
    elif data_is_mock(config) and logging.sample_chat_template is None:
        raise ValueError("--sample-questions with --mock-data needs --sample-chat-template, because no data names one")


def validate_freezing(config: Config) -> None:
    """Check that what is frozen is there.

    Raises:
        ValueError: a freeze flag of a part that the stage does not have.
    """
    for part in FREEZABLE:
        if getattr(config.recipe, f"freeze_{part}") and part not in config.stage.parts:
            name = part.replace("_", "-")
            raise ValueError(f"{config.stage.title} has no {name} to freeze; leave out --freeze-{name}")


def _validate_recipe(config: Config) -> None:
    _validate_settings_of_other_stages(config)
    validate_freezing(config)
    if any(weight < 0 for weight in vars(config.loss).values()):
        raise ValueError(f"weights of losses must not be negative: {vars(config.loss)}")
    if config.stage.has_teachers:
        if config.init.vision_teacher is None and not data_is_mock(config):
            raise ValueError(
                "stage 1 distils a vision teacher: give --vision-teacher FOLDER (a Hugging Face CLIP or SigLIP)"
            )
        if config.init.language_model is None and config.weights_from is None and not data_is_mock(config):
            raise ValueError("stage 1 needs the text embedding of a language model: give --language-model FOLDER")
        if config.model.text_embedding == "folded":
            raise ValueError(
                "stage 1 needs --text-embedding factored: its teacher is the language model's own matrix, which a "
                "folded embedding no longer holds"
            )


def _validate_settings_of_other_stages(config: Config) -> None:
    """Refuse what this stage would ignore."""
    defaults = Config()
    for stage in STAGES.values():
        for setting in stage.own_settings if stage != config.stage else ():
            section, _, field = setting.partition(".")
            usual = getattr(defaults, section)
            for name, value in vars(getattr(config, section)).items():
                if field in ("", name) and value != getattr(usual, name):
                    raise ValueError(
                        f"--{name.replace('_', '-')} is for {stage.title} only ({stage.name}_haplovl.py); leave it out"
                    )


def data_is_mock(config: Config) -> bool:
    """Whether the run needs no files at all (then teachers are made at random, too)."""
    return config.data.mock_data


def _validate_parallel(config: Config) -> None:
    parallel = config.parallel
    workload = Workload.of(config)
    # The number of data-parallel ranks is known only when the processes have met.
    layout = Layout.of(config)
    for sentence in check_layout(workload, layout).values():
        raise ValueError(sentence)
    if config.precision.compile and parallel.recompute_granularity != "none":
        raise ValueError("--compile plans by itself what to compute again; leave --recompute-granularity out")
    if parallel.pipeline_model_parallel_size == 1 and parallel.pipeline_partition != "auto":
        raise ValueError(
            f"--pipeline-partition {parallel.pipeline_partition} needs --pipeline-model-parallel-size above 1"
        )
    for name in ("tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size"):
        if config.precision.compile and getattr(parallel, name) > 1:
            raise ValueError(f"--compile is not tested with --{name.replace('_', '-')} above 1; leave one of them out")
    if config.precision.compile and (parallel.zero_stage == 3 or parallel.offload_optimizer != "none"):
        raise ValueError("--compile is not tested with --zero-stage 3 or --offload-optimizer; leave one of them out")
