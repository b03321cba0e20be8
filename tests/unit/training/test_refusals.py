"""A check of ours ends a run with its sentence; any other error keeps its traceback."""

import pytest
import torch

from megatron_haplovl.config.allowed import Allowed
from megatron_haplovl.training.refusals import refusals_in_one_line


def test_our_refusals_are_sentences():
    with (
        pytest.raises(SystemExit, match=r"^error: --allow-missing \(: not a regular expression"),
        refusals_in_one_line(),
    ):
        Allowed(missing=("(",))


def test_other_errors_stay():
    with pytest.raises(ValueError, match="elsewhere"), refusals_in_one_line():
        raise ValueError("elsewhere")
    with pytest.raises(ValueError), refusals_in_one_line():
        torch.optim.AdamW([torch.zeros(1)], lr=-1.0)
    with pytest.raises(ZeroDivisionError), refusals_in_one_line():
        raise ZeroDivisionError
