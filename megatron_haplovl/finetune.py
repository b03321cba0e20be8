"""Stage 2: visual instruction tuning of the whole model, or of the connector only (paper Sec. 3.2).

deepspeed --module megatron_haplovl.finetune --model haplovl-debug --mock-data --train-iters 10 --global-batch-size 4
"""

from megatron_haplovl.config.cli import parse_command_line
from megatron_haplovl.operation.signals import StopSignals
from megatron_haplovl.operation.supervise import parsed, supervised
from megatron_haplovl.training.loop import train
from megatron_haplovl.training.setup import setup


def main(signals: StopSignals | None = None) -> None:
    command = parsed(
        lambda: parse_command_line("finetune", "Stage 2: next-token prediction on the answers of visual instructions.")
    )
    with supervised(command.config, signals) as operation:
        run = setup(command.config, command.differences, operation)
        operation.ending = train(run)
        run.close()


if __name__ == "__main__":
    main()
