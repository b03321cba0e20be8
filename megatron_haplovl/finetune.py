"""Stage 2: visual instruction tuning of the whole model, or of the connector only (paper Sec. 3.2).

deepspeed --module megatron_haplovl.finetune --model haplovl-debug --mock-data --train-iters 10 --global-batch-size 4
"""

from megatron_haplovl.config.cli import parse_command_line
from megatron_haplovl.operation.streams import forgive_broken_streams
from megatron_haplovl.operation.supervise import finish, supervised
from megatron_haplovl.training.loop import train
from megatron_haplovl.training.setup import setup


def main() -> None:
    forgive_broken_streams()
    command = parse_command_line("finetune", "Stage 2: next-token prediction on the answers of visual instructions.")
    with supervised(command.config) as operation:
        run = setup(command.config, command.differences, operation)
        ending = train(run)
        run.close()
    finish(ending)


if __name__ == "__main__":
    main()
