"""`haplovl-plan`: which parallel layout fits a model on a cluster, and what each would cost."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_haplovl.commands.plan_arguments import (
    build_parser,
    cluster_from,
    config_from,
    sequence_from,
    workload_from,
)
from megatron_haplovl.commands.plan_report import print_report, write_json
from megatron_haplovl.commands.plan_search import search


def main(argv: Sequence[str] | None = None) -> int:
    """Print what the layouts would cost, and recommend one.

    Returns:
        1 if no layout is possible, else 0.
    """
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        base, config = config_from(arguments)
        work = sequence_from(arguments, config)
        workload, batch = workload_from(arguments, config)
    except ValueError as error:
        parser.error(str(error))
    cluster = cluster_from(arguments)
    found = search(arguments, workload, work, cluster, config.recipe)
    print_report(base, arguments.top, config, workload, batch, work, cluster, found)
    if arguments.json:
        write_json(Path(arguments.json), arguments, workload, work, found)
    return 0 if found.possible else 1


if __name__ == "__main__":
    sys.exit(main())
