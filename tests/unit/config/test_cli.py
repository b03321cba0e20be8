import argparse
import dataclasses

import pytest

from megatron_haplovl.config.cli import build_config, build_parser, flags_to_reach, parse_args
from megatron_haplovl.config.schema import Config
from megatron_haplovl.config.settings import iterate_settings

MOCK = ["--model", "haplovl-debug", "--mock-data"]
ASKS = ["--sample-questions", "q"]
LINEAR = ["--post-rope-scaling-type", "linear"]
WIDE = ["--post-hidden-size", "128", "--post-num-attention-heads", "4", "--post-num-key-value-heads", "4"]


def test_precedence_is_schema_then_stage_then_preset_then_flag():
    stage1 = parse_args("pretrain", argv=MOCK)
    stage2 = parse_args("finetune", argv=MOCK)
    assert (stage1.optimizer.lr, stage1.optimizer.adam_beta2, stage1.optimizer.weight_decay) == (1e-4, 0.95, 1e-4)
    assert (stage2.optimizer.lr, stage2.optimizer.adam_beta2, stage2.optimizer.weight_decay) == (2e-5, 0.98, 0.0)
    assert (stage1.schedule.global_batch_size, stage1.schedule.train_iters) == (256, 40_000)
    assert (stage1.recipe.recipe, stage2.recipe.recipe) == ("distill", "full")
    assert stage1.data.seq_length == 512
    flagged = parse_args("pretrain", argv=[*MOCK, "--lr", "3e-4", "--seq-length", "128", "--pre-num-layers", "2"])
    assert (flagged.optimizer.lr, flagged.data.seq_length, flagged.model.pre.num_layers) == (3e-4, 128, 2)
    assert flagged.model.post == stage1.model.post


def test_every_setting_is_documented_and_has_its_own_flag():
    settings = list(iterate_settings(Config))
    assert all(s.field.metadata["help"] for s in settings)
    flags = [s.flag for s in settings]
    assert len(flags) == len(set(flags))
    help_text = build_parser("pretrain", "").format_help()
    assert all(flag in help_text for flag in flags)


def test_lists_and_switches():
    config = parse_args(
        "finetune", argv=["--model", "haplovl-debug", "--data-path", "0.3", "a", "0.7", "b", "--no-packing"]
    )
    assert config.data.data_path == ("0.3", "a", "0.7", "b")
    assert config.data.packing is False


def test_the_launchers_local_rank_is_accepted():
    assert parse_args("finetune", argv=[*MOCK, "--local_rank=1"]) == parse_args("finetune", argv=MOCK)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*MOCK, "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        ([*MOCK, "--train-it", "5"], "unrecognized arguments"),
        ([*MOCK, "--recipe", "half"], "invalid choice: 'half'"),
        ([*MOCK, "--data-path", "x"], "--mock-data reads no files"),
        (["--model", "haplovl-debug"], "nothing to train on"),
        ([*MOCK, "--global-batch-size", "5", "--micro-batch-size", "2"], "not a multiple of --micro-batch-size 2"),
        ([*MOCK, "--patch-size", "7"], "--image-size 64 is not a multiple of --patch-size 7"),
        ([*MOCK, "--post-num-key-value-heads", "4"], "not a multiple of --post-num-key-value-heads 4"),
        ([*MOCK, "--pre-num-layers", "0"], "--pre-num-layers must be at least 1"),
        ([*MOCK, "--post-rope-scaling-factor", "8"], "--post-rope-scaling-type none scales nothing"),
        ([*MOCK, *LINEAR, "--post-rope-scaling-factor", "0.5"], "--post-rope-scaling-factor must be at least 1"),
        (
            [*MOCK, *LINEAR, "--post-rope-scaling-low-freq-factor", "4"],
            "below --post-rope-scaling-high-freq-factor 4.0",
        ),
        ([*MOCK, *LINEAR, "--post-rope-scaling-original-positions", "0"], "-original-positions must be at least 1"),
        ([*MOCK, "--lr-warmup-iters", "9", "--train-iters", "9"], "less than the 9 steps"),
        ([*MOCK, "--min-lr", "1"], "larger than --lr"),
        ([*MOCK, "--save-interval", "3"], "--save-interval needs --save"),
        ([*MOCK, "--finetune"], "--finetune takes the weights of --load"),
        ([*MOCK, "--finetune", "--load", "x", "--save", "x"], "a restart would lose what the run has done"),
        (
            [*MOCK, "--finetune", "--load", "x", "--pretrained-checkpoint", "y"],
            "leave --pretrained-checkpoint out",
        ),
        ([*MOCK, "--allow-fallback"], "--allow-fallback needs --load"),
        ([*MOCK, "--keep-last", "2"], "--keep-last and --async-save need --save"),
        ([*MOCK, "--allow-missing", "lm_head.weight", "(connector"], "--allow-missing (connector: not a regular expr"),
        (["--model", "haplovl-debug", "--data-path", "x", "--aux-data-path", "y"], "for stage 1 only"),
        ([*MOCK, "--valid-data-path", "x"], "--mock-data reads no files"),
        ([*MOCK, "--recipe", "distill"], "finetune_haplovl.py trains --recipe align or full"),
        ([*MOCK, "--exit-interval", "3"], "so it needs --save"),
        ([*MOCK, "--eval-interval", "3"], "--eval-interval needs --valid-data-path"),
        ([*MOCK, "--lr-decay-style", "constant", "--min-lr", "1e-6"], "never decays"),
        ([*MOCK, "--image-token-budget", "64"], "with --image-aspect-ratio resize every image has one; leave it out"),
        (
            [*MOCK, "--image-aspect-ratio", "anyres", "--image-token-budget", "15"],
            "--image-token-budget 15 is less than the 16 patches of one tile",
        ),
        ([*MOCK, "--teacher-layer", "-2"], "--teacher-layer is for stage 1"),
        ([*MOCK, "--ctp-loss-weight", "0.5"], "--ctp-loss-weight is for stage 1 only"),
        ([*MOCK, "--tensor-model-parallel-size", "2"], "--post-num-attention-heads 5 is not a multiple of"),
        ([*MOCK, "--context-parallel-size", "3"], "--pre-num-attention-heads 4 is not a multiple of"),
        ([*MOCK, "--sequence-parallel"], "it needs --tensor-model-parallel-size above 1"),
        (
            [*MOCK, *WIDE, "--tensor-model-parallel-size", "2", "--sequence-parallel", "--seq-length", "301"],
            "--seq-length 301 is not a multiple of",
        ),
        ([*MOCK, *WIDE, "--tensor-model-parallel-size", "2", "--compile"], "--compile is not tested with"),
        ([*MOCK, "--zero-stage", "0", "--offload-optimizer", "cpu"], "it needs --zero-stage 1, 2 or 3"),
        ([*MOCK, "--zero-stage", "2", "--offload-param", "cpu"], "it needs --zero-stage 3, not 2"),
        (
            [*MOCK, "--offload-optimizer", "cpu", "--adamw-implementation", "apex"],
            "use auto, deepspeed or torch",
        ),
        ([*MOCK, "--recompute-granularity", "full", "--compile"], "leave --recompute-granularity out"),
        ([*MOCK, "--zero-stage", "3", "--compile"], "--compile is not tested with --zero-stage 3"),
        ([*MOCK, "--offload-optimizer", "cpu", "--compile"], "or --offload-optimizer; leave one of them out"),
        ([*MOCK, "--pipeline-partition", "uniform"], "needs --pipeline-model-parallel-size above 1"),
        (
            [*MOCK, "--pipeline-model-parallel-size", "2", "--compile"],
            "--pipeline-model-parallel-size above 1; leave one",
        ),
        ([*MOCK, "--pipeline-model-parallel-size", "2", "--zero-stage", "2"], "use --zero-stage 1 or no pipeline"),
        ([*MOCK, *WIDE, "--context-parallel-size", "2", "--compile"], "--context-parallel-size above 1"),
        ([*MOCK, "--sample-interval", "5"], "--sample-interval is about --sample-questions; give that"),
        ([*MOCK, "--sample-questions", "q"], "--sample-questions needs --tokenizer-model"),
        ([*MOCK, *ASKS, "--tokenizer-model", "t"], "needs --sample-chat-template, because no data names one"),
        ([*MOCK, *ASKS, "--sample-interval", "0"], "--sample-interval must be at least 1, got 0"),
        ([*MOCK, *ASKS, "--sample-max-new-tokens", "0"], "--sample-max-new-tokens must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused_with_a_sentence(words, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_args("finetune", argv=words)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data-path", "x"], "--vision-teacher"),
        (["--data-path", "x", "--vision-teacher", "t"], "--language-model"),
        (["--mock-data", "--text-embedding", "folded"], "--text-embedding factored"),
        (["--mock-data", "--freeze-connector"], "no connector"),
        (["--mock-data", "--vision-loss-weight", "-1"], "must not be negative"),
        (["--mock-data", "--sample-questions", "q"], "--sample-questions is for stage 2 only"),
    ],
)
def test_stage_1_needs_its_teachers(words, message, capsys):
    with pytest.raises(SystemExit):
        parse_args("pretrain", argv=["--model", "haplovl-debug", *words])
    assert message in capsys.readouterr().err


def test_help_survives_percent_signs_and_prints(capsys):
    parser = build_parser("finetune", "100 % of the model")
    assert isinstance(parser, argparse.ArgumentParser)
    parser.print_help()
    assert "--post-qkv-bias" in capsys.readouterr().out


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match="unknown model preset 'x'"):
        build_config("finetune", "x", {})
    with pytest.raises(ValueError, match="unknown stage 'x'"):
        build_config("x", "haplovl-debug", {})


def test_configuration_is_frozen():
    config = parse_args("finetune", argv=MOCK)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.run.seed = 1  # type: ignore[misc]


def test_flags_that_turn_a_preset_into_a_model():
    words = ["--vocab-size", "600", "--image-newline", *LINEAR, "--post-rope-scaling-factor", "2.0", "--pre-gated-mlp"]
    preset, wanted = parse_args("finetune", argv=MOCK).model, parse_args("finetune", argv=[*MOCK, *words]).model
    flags = flags_to_reach(preset, wanted)
    assert sorted(flags) == sorted(words)
    assert parse_args("finetune", argv=[*MOCK, *flags]).model == wanted
    assert flags_to_reach(wanted, preset)[:3] == ["--vocab-size", "512", "--no-image-newline"]
