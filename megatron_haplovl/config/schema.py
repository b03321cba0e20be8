"""Every setting of a run, as frozen dataclasses: one class per concern, one help text per field.

Command-line flags are generated from these fields (:mod:`megatron_haplovl.config.cli`), so the `help` of a field is
its only documentation. A field named `num_layers` in the section with the prefix `pre` becomes `--pre-num-layers`.
Nothing here imports torch: a configuration can be built, checked and written to JSON anywhere.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from megatron_haplovl.config.setting import setting
from megatron_haplovl.config.stages import RECIPES, StageSpec
from megatron_haplovl.config.vision import VisionConfig


@dataclass(frozen=True)
class PreDecoderConfig:
    """The pre-decoder: a vision transformer's blocks plus RoPE, without class token (paper Sec. 3.1)."""

    num_layers: int = setting(24, "blocks")
    hidden_size: int = setting(1024, "width d")
    ffn_hidden_size: int = setting(4096, "width of the MLP")
    num_attention_heads: int = setting(16, "attention heads")
    activation: str = setting("quick_gelu", "MLP activation", choices=("quick_gelu", "gelu", "gelu_tanh"))
    layernorm_epsilon: float = setting(1e-5, "epsilon of the LayerNorms")
    rope_theta: float = setting(10000.0, "base of the rotary embedding")
    gated_mlp: bool = setting(
        False,
        "gate the MLP: down(activation(gate(x)) * up(x)), for released checkpoints whose training has moved up(x) away "
        "from 1 (with up(x) = 1 the gated MLP is the plain one)",
    )


@dataclass(frozen=True)
class RopeScalingConfig:
    """Rotary frequencies stretched for contexts longer than the language model was first trained on."""

    type: str = setting(
        "none",
        "none; linear: all frequencies are divided by the factor; llama3: low ones are divided, high ones kept, those "
        "between blended (Llama 3.1)",
        choices=("none", "linear", "llama3"),
    )
    factor: float = setting(1.0, "what frequencies are divided by; 1 with type none")
    low_freq_factor: float = setting(
        1.0, "llama3: frequencies of fewer turns than this over the original positions are divided"
    )
    high_freq_factor: float = setting(
        4.0, "llama3: frequencies of more turns than this over the original positions are kept"
    )
    original_positions: int = setting(8192, "llama3: positions that the language model was first trained on")


@dataclass(frozen=True)
class PostDecoderConfig:
    """The post-decoder: a Llama-family language model's blocks (paper Sec. 3.1)."""

    num_layers: int = setting(32, "blocks")
    hidden_size: int = setting(4096, "width l")
    ffn_hidden_size: int = setting(14336, "width of the SwiGLU MLP")
    num_attention_heads: int = setting(32, "query heads")
    num_key_value_heads: int = setting(8, "key/value heads; fewer than query heads is grouped-query attention")
    norm_epsilon: float = setting(1e-5, "epsilon of the RMSNorms")
    rope_theta: float = setting(500000.0, "base of the rotary embedding")
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig, metadata={"prefix": "post-rope-scaling"})
    qkv_bias: bool = setting(False, "biases on the q, k and v projections (Qwen2.5)")
    linear_bias: bool = setting(
        False, "biases on the o, gate, up and down projections, for released checkpoints that have trained them"
    )


@dataclass(frozen=True)
class ModelConfig:
    """The whole model. `vision`, `pre` and `post` are sections of their own."""

    vocab_size: int = setting(128256, "rows of the text embedding and of the output head")
    text_embedding: str = setting(
        "factored",
        "factored: the language model's matrix [V, l] followed by a projector l -> d; "
        "folded: their product [V, d], the form of a released checkpoint",
        choices=("factored", "folded"),
    )
    image_attention: str = setting(
        "bidirectional",
        "what the tokens of one image see of each other. bidirectional: all (the paper); causal: the earlier ones, as "
        "the released package computes it on some of its paths, for comparisons with it",
        choices=("bidirectional", "causal"),
    )
    init_std: float = setting(0.02, "standard deviation of newly initialised weights")
    vision: VisionConfig = field(default_factory=VisionConfig, metadata={"prefix": ""})
    pre: PreDecoderConfig = field(default_factory=PreDecoderConfig, metadata={"prefix": "pre"})
    post: PostDecoderConfig = field(default_factory=PostDecoderConfig, metadata={"prefix": "post"})


@dataclass(frozen=True)
class InitConfig:
    """Where the initial weights come from."""

    vision_teacher: str | None = setting(
        None,
        "Hugging Face folder of CLIP or SigLIP, with or without its text half: initialises the pre-decoder and teaches "
        "stage 1",
    )
    language_model: str | None = setting(
        None,
        "Hugging Face folder of a LlamaForCausalLM or Qwen2ForCausalLM: its embedding matrix, and in stage 2 the "
        "post-decoder",
    )
    teacher_layer: int = setting(
        -1, "stage 1: the teacher's hidden state that is distilled, counted as in `output_hidden_states`"
    )
    pretrained_checkpoint: str | None = setting(
        None, "start from the weights of this training checkpoint (a --save folder, or one global_stepN in it)"
    )
    allow_missing: tuple[str, ...] = setting(
        (),
        "parameters that may start at random though they should be inherited; regular expressions of whole names, such "
        "as lm_head.weight",
        metavar="REGEX",
    )
    allow_unexpected: tuple[str, ...] = setting(
        (),
        "tensors of a folder or checkpoint that may be skipped though the model has no place for them; regular "
        "expressions of whole names",
        metavar="REGEX",
    )


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how it is packed (data preprocessed by haplovl-preprocess)."""

    data_path: tuple[str, ...] = setting(
        (), "prefixes of preprocessed data: one PREFIX, or WEIGHT PREFIX pairs to blend several", metavar="PREFIX"
    )
    aux_data_path: tuple[str, ...] = setting(
        (),
        "stage 1: auxiliary samples, each joined at random before or behind a main sample (paper Sec. 4.1); "
        "same form as --data-path",
        metavar="PREFIX",
    )
    valid_data_path: tuple[str, ...] = setting(
        (), "held-out data for evaluation; same form as --data-path", metavar="PREFIX"
    )
    data_config: str | None = setting(
        None,
        "mixture: a YAML file of sources, in place of --data-path, --aux-data-path and --valid-data-path; "
        "LLaVA-OneVision's own form is read, too",
        metavar="YAML",
    )
    data_var: tuple[str, ...] = setting(
        (),
        "what ${NAME} stands for in the paths of --data-config; wins over file and environment",
        metavar="NAME=VALUE",
    )
    split: str | None = setting(
        None,
        "hold samples of the training data out for evaluation, by a hash of what they hold: 990,10 holds out 1 %; of "
        "990,5,5 nothing reads the last 5",
        metavar="TRAIN,VALID",
    )
    data_cache_path: str | None = setting(None, "folder for cached pack plans (default: beside the data)")
    tokenizer_model: str | None = setting(
        None, "Hugging Face tokenizer folder or sentencepiece .model; checked against the data's manifest"
    )
    mock_data: bool = setting(False, "train on random images and tokens, without any files")
    seq_length: int = setting(2048, "tokens in one packed sequence, visual tokens included")
    packing: bool = setting(True, "put several samples into one sequence; without it, one sample per sequence")
    skip_long_samples: bool = setting(False, "leave out samples longer than --seq-length (otherwise an error)")
    skip_bad_samples: int = setting(
        0,
        "go on without a document that cannot be read, and name it; the run ends after more than this many such "
        "samples, restarts included (default: after the first one)",
    )
    num_workers: int = setting(2, "data loading processes per rank; 0 loads in the training process")
    loader_timeout_seconds: int = setting(
        120, "seconds that a rank waits for its next micro-batch before the run ends and names step and source"
    )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rates. Defaults depend on the stage (paper Tables 8 and 9)."""

    lr: float = setting(1e-4, "peak learning rate")
    min_lr: float = setting(0.0, "learning rate at the end of the decay")
    embedding_lr: float | None = setting(None, "peak learning rate of the embeddings, if it differs from --lr")
    pre_decoder_lr: float | None = setting(None, "peak learning rate of the pre-decoder, if it differs from --lr")
    connector_lr: float | None = setting(None, "peak learning rate of the connector, if it differs from --lr")
    post_decoder_lr: float | None = setting(
        None, "peak learning rate of the post-decoder, final norm and output head, if it differs from --lr"
    )
    weight_decay: float = setting(1e-4, "weight decay of matrices; norms, biases and 1-d parameters have none")
    adam_beta1: float = setting(0.9, "AdamW's first beta")
    adam_beta2: float = setting(0.95, "AdamW's second beta")
    adam_eps: float = setting(1e-8, "AdamW's epsilon")
    adamw_implementation: str = setting(
        "auto",
        "torch: torch's fused AdamW; deepspeed: its FusedAdam on a GPU, its CPUAdam on a CPU and for an offloaded "
        "optimizer (either is compiled at first use); apex: NVIDIA apex; auto: deepspeed with --offload-optimizer, "
        "otherwise torch",
        choices=("auto", "torch", "deepspeed", "apex"),
    )
    clip_grad: float = setting(1.0, "clip the global gradient norm to this; 0 turns clipping off")


@dataclass(frozen=True)
class ScheduleConfig:
    """Length of the run and course of the learning rate."""

    train_iters: int = setting(40000, "optimizer steps")
    train_samples: int | None = setting(
        None,
        "in place of --train-iters: train until so many samples are consumed, counted as --global-batch-size counts "
        "them (with --batch-unit packs, packed sequences); the last step is a whole one. The learning rate is then a "
        "function of the samples that are consumed",
    )
    micro_batch_size: int = setting(1, "sequences per forward pass and rank")
    global_batch_size: int = setting(256, "sequences or samples (see --batch-unit) per optimizer step, over all ranks")
    rampup_batch_size: tuple[int, ...] = setting(
        (),
        "START INCREMENT SAMPLES: begin with a global batch of START and raise it by INCREMENT until it is "
        "--global-batch-size, in equal shares of SAMPLES samples, counted as --global-batch-size counts them",
        metavar="N",
    )
    batch_unit: str = setting(
        "packs",
        "what --global-batch-size counts. packs: sequences, however many samples they hold; samples: samples (in stage "
        "1 joined ones), exactly as many in every step, in as few sequences as hold them. Then every step has as many "
        "sequences as the step that needs most of them; those left over are empty and cost nothing",
        choices=("packs", "samples"),
    )
    lr_decay_style: str = setting("cosine", "shape of the decay", choices=("cosine", "linear", "constant"))
    lr_decay_iters: int | None = setting(None, "steps until --min-lr is reached (default: --train-iters)")
    lr_decay_samples: int | None = setting(
        None, "with --train-samples: samples until --min-lr is reached (default: --train-samples)"
    )
    lr_warmup_iters: int = setting(0, "steps of linear warm-up")
    lr_warmup_samples: int | None = setting(
        None,
        "with --train-samples: samples of linear warm-up (default: the stage's --lr-warmup-iters, as steps of full "
        "batches)",
    )

    @property
    def counted_in(self) -> str:
        """What the length of the run and its learning rate are counted in, as the flags' names have it."""
        return "iters" if self.train_samples is None else "samples"

    @property
    def warmup(self) -> int:
        """The warm-up, so counted."""
        return self.lr_warmup_iters if self.train_samples is None else self.lr_warmup_samples or 0

    @property
    def decay_end(self) -> int:
        """Where the decay ends, so counted."""
        if self.train_samples is None:
            return self.train_iters if self.lr_decay_iters is None else self.lr_decay_iters
        return self.train_samples if self.lr_decay_samples is None else self.lr_decay_samples


@dataclass(frozen=True)
class RecipeConfig:
    """What trains. A frozen part keeps its weights, has no optimizer state and no gradient."""

    recipe: str = setting(
        "full", "; ".join(f"{name}: {recipe.help}" for name, recipe in RECIPES.items()), choices=tuple(RECIPES)
    )
    freeze_embedding: bool = setting(
        False,
        "freeze everything before the pre-decoder's blocks: text, patch and position embedding, newline, text "
        "projector and pre_norm",
    )
    freeze_pre_decoder: bool = setting(False, "freeze the pre-decoder's blocks")
    freeze_connector: bool = setting(False, "freeze the connector")
    freeze_post_decoder: bool = setting(False, "freeze the post-decoder's blocks, final norm and output head")


@dataclass(frozen=True)
class LossConfig:
    """Weights of the losses in their sum. The paper adds stage 1's three up as they are (Sec. 3.2)."""

    vision_loss_weight: float = setting(1.0, "stage 1: weight of the vision loss (paper Eq. 2)")
    feature_loss_weight: float = setting(1.0, "stage 1: weight of the text feature loss (paper Eq. 3)")
    ctp_loss_weight: float = setting(1.0, "stage 1: weight of the current-token loss (paper Eq. 4)")


@dataclass(frozen=True)
class ParallelConfig:
    """How the work is spread. The DeepSpeed JSON and these flags must agree."""

    tensor_model_parallel_size: int = setting(1, "ranks that share every layer's weights")
    sequence_parallel: bool = setting(
        False, "with tensor parallelism: shard norms and residual stream along the sequence, too"
    )
    context_parallel_size: int = setting(
        1, "ranks that share every sequence's tokens, and inside attention its heads (Ulysses)"
    )
    pipeline_model_parallel_size: int = setting(1, "stages that share the layers")
    pipeline_partition: str = setting(
        "auto",
        "where the stages begin. auto: equal computation, by a cost model on the run's own data; parameters: equal "
        "numbers of trained parameters; uniform: equal numbers of layers; or the first layer of every stage but the "
        "first, such as pre_decoder.12,connector,post_decoder.16",
        metavar="auto|parameters|uniform|LAYER,...",
    )
    zero_stage: int = setting(1, "ZeRO stage", choices=(0, 1, 2, 3))
    offload_optimizer: str = setting(
        "none",
        "cpu: master weights and optimizer state lie in the host's memory, and the optimizer steps there; needs ZeRO",
        choices=("none", "cpu"),
    )
    offload_param: str = setting(
        "none", "cpu: parameters lie in the host's memory until they are used; ZeRO 3 only", choices=("none", "cpu")
    )
    deepspeed_config: str | None = setting(
        None, "DeepSpeed JSON; its settings are used and must not contradict the flags", metavar="JSON"
    )
    recompute_granularity: str = setting(
        "none",
        "what is computed again in backward instead of kept. selective: the MLP half of every block; full: every block "
        "from its input",
        choices=("none", "selective", "full"),
    )
    distributed_timeout_minutes: int = setting(
        10,
        "minutes that ranks may wait for one another, in every process group; the run ends somewhat earlier, and the "
        "rank that keeps the others waiting is named",
    )
    distributed_timeout_seconds_after_init: int | None = setting(
        None, "seconds that ranks may wait for one another once the first step is done (default: as before it)"
    )

    @property
    def timeout_of_steps(self) -> tuple[float, str]:
        """Seconds that ranks may wait for one another once the first step is done, and the flag that says so."""
        if self.distributed_timeout_seconds_after_init is not None:
            return float(self.distributed_timeout_seconds_after_init), "--distributed-timeout-seconds-after-init"
        return 60.0 * self.distributed_timeout_minutes, "--distributed-timeout-minutes"


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats and kernels."""

    bf16: bool = setting(
        False, "train in bfloat16 with fp32 master weights and fp32 gradient accumulation (default: fp32)"
    )
    attention_backend: str = setting(
        "auto",
        "implementation of the mixed-mask attention; the log's first line says what auto stands for",
        choices=(
            "auto",
            "reference",
            "cpu_segments",
            "flash",
            "flash3",
            "flash4",
            "flash_merged",
            "triton",
            "flex",
            "sdpa",
        ),
    )
    compile: bool = setting(
        False, "compile every block with torch.compile (attention itself, already fused, stays outside)"
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving and resuming."""

    save: str | None = setting(None, "folder that receives checkpoints")
    load: str | None = setting(
        None,
        "resume everything from the newest checkpoint in this folder, if there is one; the layout may have changed",
    )
    finetune: bool = setting(
        False, "take only the weights from --load; moments, schedule and position in the data start anew"
    )
    save_interval: int | None = setting(None, "steps between checkpoints (default: only at the end)")
    keep_last: int | None = setting(None, "checkpoints to keep in --save, the newest ones (default: all)")
    keep_every: int | None = setting(
        None, "beside those of --keep-last, keep for good the checkpoints whose step this divides"
    )
    max_failed_saves: int = setting(3, "end the run when so many saves that were due have failed one after the other")
    non_persistent_save_interval: int | None = setting(
        None, "steps between copies in --non-persistent-local-ckpt-dir, of which the newest is kept"
    )
    non_persistent_local_ckpt_dir: str | None = setting(
        None,
        "folder on each machine's own disk for copies that cost little; a restart goes on from the newest one if it is "
        "whole and newer than the newest checkpoint in --save",
    )
    async_save: bool = setting(False, "write checkpoints while training goes on; it waits only for a copy on the host")
    allow_fallback: bool = setting(
        False, "if the newest checkpoint in --load is damaged, resume from the newest one before it that is whole"
    )
    override_opt_param_scheduler: bool = setting(
        False, "when resuming, the learning rates of the flags win over the checkpoint's, and no warning says so"
    )
    use_checkpoint_opt_param_scheduler: bool = setting(
        False, "when resuming, go on with the checkpoint's learning rates and their schedule instead of the flags'"
    )
    exit_interval: int | None = setting(None, "save and stop after every step divisible by this")
    exit_duration_in_mins: int | None = setting(
        None, "save and stop after the first step that ends this many minutes after the start"
    )
    kill_switch_file: str | None = setting(
        None,
        "save and stop when this file appears; it is removed then (default: a file named exit in --save)",
        metavar="FILE",
    )


@dataclass(frozen=True)
class LoggingConfig:
    """What is reported, and where."""

    log_interval: int = setting(10, "steps between log lines")
    eval_interval: int | None = setting(
        None,
        "steps between evaluations on --valid-data-path; one is always made before the first step and after the last",
    )
    eval_iters: int = setting(10, "global batches per evaluation")
    sample_questions: str | None = setting(
        None,
        "stage 2: answer these questions with the model in training, greedily, every --sample-interval steps and after "
        "the last one. A file as haplovl-evaluate reads it; the true answers may be left out",
        metavar="FILE",
    )
    sample_image_folder: str | None = setting(None, "folder in which the image paths of --sample-questions begin")
    sample_interval: int | None = setting(
        None, "steps between answers to --sample-questions (default: only after the last step)"
    )
    sample_max_new_tokens: int = setting(32, "longest answer to one of --sample-questions, in tokens")
    sample_chat_template: str | None = setting(
        None,
        "chat template of --sample-questions: a name or a .jinja file (default: the one of the training data)",
    )
    metrics_file: str | None = setting(None, "write every logged value to this JSON-lines file, each step once")
    tensorboard_dir: str | None = setting(None, "write TensorBoard events to this folder")
    wandb_project: str | None = setting(None, "report to this Weights & Biases project")
    log_params_norm: bool = setting(False, "log the norm of all weights")
    log_num_zeros_in_grad: bool = setting(False, "log how many elements of the gradient are zero")
    device_peak_tflops: float | None = setting(
        None,
        "10^12 operations per second that the device's data sheet promises for the run's number format, without "
        "sparsity; MFU is a share of it (default: known for common GPUs in bf16, elsewhere there is no MFU)",
    )
    live_display: bool = setting(
        True, "on a terminal, show the state of the run below its lines (needs the package rich; elsewhere only lines)"
    )


@dataclass(frozen=True)
class ProfileConfig:
    """Where the time of some steps goes."""

    profile: bool = setting(False, "record some steps with torch's profiler, with a named range for every part")
    profile_step_start: int = setting(10, "steps that are done when recording begins")
    profile_step_end: int = setting(12, "steps that are done when it ends")
    profile_ranks: tuple[int, ...] = setting((0,), "ranks that record", metavar="RANK")
    profile_dir: str | None = setting(None, "folder for the traces (default: profile in --save)")
    record_memory_history: bool = setting(
        False, "with --profile on a GPU: keep who allocated what, as a snapshot for pytorch.org/memory_viz"
    )
    wall_clock_breakdown: bool = setting(
        False, "print DeepSpeed's timers in every step; they wait for the device, so the run becomes slower"
    )


@dataclass(frozen=True)
class GuardConfig:
    """What is checked in every step, and what happens to a step that must not be trained on."""

    check_for_nan_in_loss_and_grad: bool = setting(
        True,
        "before every update, look whether losses and gradients are finite. Off, nothing is looked at, and what is not "
        "finite goes into the weights",
    )
    iterations_to_skip: tuple[int, ...] = setting(
        (),
        "steps that are passed over, counted from 1 as in the log: their data is consumed, nothing is computed or "
        "updated",
        metavar="STEP",
    )
    max_skipped_steps: int = setting(
        0,
        "steps in a row that may be left out because a loss or a gradient is not finite; one more ends the run. With 0 "
        "the first one does",
    )
    check_for_spiky_loss: bool = setting(
        False, "name a step whose loss is far above the median of the last 100 steps, and keep its batch"
    )
    spiky_loss_factor: float = setting(10.0, "how many times the median a loss must be to be called a spike")
    spiky_loss_action: str = setting(
        "warn",
        "warn: the step is trained on; return: it is not, the run goes back to its last checkpoint and passes the step "
        "over from then on",
        choices=("warn", "return"),
    )
    check_replicas: int | None = setting(
        None,
        "every so many steps, and before every save, compare the weights that several ranks hold, bit for bit "
        "(default: never)",
    )


@dataclass(frozen=True)
class RunConfig:
    """The run as such."""

    seed: int = setting(1234, "seed of weights, data order and joining")
    device: str = setting(
        "auto", "auto: a GPU if DeepSpeed's accelerator offers one, else the CPU", choices=("auto", "cpu", "cuda")
    )
    manual_gc: bool = setting(
        False, "turn Python's automatic garbage collection off; it collects on all ranks at the same step instead"
    )
    manual_gc_interval: int = setting(
        0, "with --manual-gc: steps between collections; 0: none but those of evaluations"
    )
    manual_gc_eval: bool = setting(True, "with --manual-gc: collect before and after every evaluation")


@dataclass(frozen=True)
class Config:
    """Everything about one run. Built by :func:`megatron_haplovl.config.cli.parse_command_line` or by hand."""

    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def stage(self) -> StageSpec:
        """The stage that the recipe belongs to."""
        return RECIPES[self.recipe.recipe].stage

    @property
    def resume_from(self) -> str | None:
        """The folder whose newest checkpoint the run goes on from, if there is one."""
        return None if self.checkpoint.finetune else self.checkpoint.load

    @property
    def weights_from(self) -> str | None:
        """The checkpoint whose weights a new run begins with; a run that resumes ignores it."""
        return self.checkpoint.load if self.checkpoint.finetune else self.init.pretrained_checkpoint

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionary, ready for JSON."""
        return dataclasses.asdict(self)
