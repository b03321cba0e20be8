r"""Stage 1, modal expansion: teach the pre-decoder images and text by distillation (paper Sec. 3.2).

    deepspeed --module megatron_haplovl.pretrain --model haplovl-debug --mock-data \
        --train-iters 10 --lr-warmup-iters 0 --global-batch-size 4
"""

from megatron_haplovl.config.cli import parse_command_line
from megatron_haplovl.operation.signals import StopSignals
from megatron_haplovl.operation.supervise import parsed, supervised
from megatron_haplovl.training.loop import train
from megatron_haplovl.training.setup import setup


def main(signals: StopSignals | None = None) -> None:
    command = parsed(
        lambda: parse_command_line(
            "pretrain", "Stage 1, modal expansion: distil CLIP and the text embedding into the pre-decoder."
        )
    )
    with supervised(command.config, signals) as operation:
        run = setup(command.config, command.differences, operation)
        operation.ending = train(run)
        run.close()


if __name__ == "__main__":
    main()
