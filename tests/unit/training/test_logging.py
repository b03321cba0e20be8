"""What the lines of a run look like, and which rank writes them."""

from __future__ import annotations

import logging

import pytest

from megatron_haplovl.training.logging import NO_PREFIX, configure_logging, training_line


@pytest.fixture(autouse=True)
def as_before():
    package = logging.getLogger("megatron_haplovl")
    state = (package.handlers, package.level, package.propagate)
    yield
    package.handlers, package.level, package.propagate = state


def lines_of(rank: int, capsys) -> list[str]:
    configure_logging(7)
    configure_logging(rank)
    log = logging.getLogger("megatron_haplovl.data.loader")
    log.debug("too fine")
    log.info("a plan")
    log.warning("a damage")
    logging.getLogger("megatron_haplovl.training.loop").info(training_line(1, 2, {"loss": 0.5}), extra=NO_PREFIX)
    return capsys.readouterr().out.splitlines()


def test_rank_0_reports_and_its_log_line_has_no_prefix(capsys):
    assert lines_of(0, capsys) == [
        "[rank 0] a plan",
        "[rank 0] warning: a damage",
        " iteration        1/       2 | loss: 5.000000E-01 |",
    ]


def test_other_ranks_warn_only(capsys):
    assert lines_of(3, capsys) == ["[rank 3] warning: a damage"]
