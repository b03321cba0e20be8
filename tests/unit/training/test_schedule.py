"""Learning rates of runs that count samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_haplovl.config.cli import build_config
from megatron_haplovl.training.schedule import learning_rate

STYLES = ("cosine", "linear", "constant")


def config(style: str, **values: Any) -> Any:
    floor = 0.0 if style == "constant" else 3e-6
    settings: dict[tuple[str, ...], Any] = {("schedule", name): value for name, value in values.items()}
    settings |= {("schedule", "lr_decay_style"): style, ("optimizer", "min_lr"): floor, ("optimizer", "lr"): 1.7e-4}
    return build_config("finetune", "haplovl-debug", settings)


@pytest.mark.parametrize("batch", [7, 48, 256])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("warmup", "end"), [(0, None), (9, None), (9, 70)])
def test_with_one_batch_size_they_are_those_of_steps(batch: int, style: str, warmup: int, end: int | None) -> None:
    """To the last bit."""
    decays = style != "constant" and end is not None
    steps = config(
        style,
        global_batch_size=batch,
        train_iters=100,
        lr_warmup_iters=warmup,
        lr_decay_iters=end if decays else None,
    )
    samples = config(
        style,
        global_batch_size=batch,
        train_samples=100 * batch,
        lr_warmup_samples=warmup * batch,
        **({"lr_decay_samples": end * batch} if decays and end is not None else {}),
    )
    assert samples.schedule.train_iters == 100
    assert [learning_rate(samples, step) for step in range(101)] == [learning_rate(steps, step) for step in range(101)]


@pytest.mark.parametrize("style", STYLES)
def test_behind_a_ramp_they_follow_the_samples(style: str) -> None:
    sizes = [4] * 4 + [8] * 2 + [12] * 2 + [16] * 30
    end, warmup = 400, 50
    c = config(style, global_batch_size=16, rampup_batch_size=(4, 4, 48), train_samples=end, lr_warmup_samples=warmup)
    consumed = np.cumsum([0, *sizes])
    part = np.clip((consumed[:-1] - warmup) / (end - warmup), 0.0, 1.0)
    weight = {"cosine": np.cos(part * np.pi / 2) ** 2, "linear": 1.0 - part, "constant": np.ones(len(sizes))}[style]
    floor = 0.0 if style == "constant" else 3e-6
    decayed = floor + (1.7e-4 - floor) * weight
    expected = np.where(consumed[:-1] < warmup, 1.7e-4 * np.minimum(1.0, consumed[1:] / warmup), decayed)
    np.testing.assert_allclose([learning_rate(c, step) for step in range(len(sizes))], expected, rtol=1e-12)
    assert c.schedule.train_iters == int(np.argmax(consumed >= end))


def test_in_steps_a_ramp_changes_no_rate() -> None:
    values = {"global_batch_size": 16, "train_iters": 60, "lr_warmup_iters": 7}
    plain, ramp = config("cosine", **values), config("cosine", **values, rampup_batch_size=(4, 4, 48))
    assert [learning_rate(plain, step) for step in range(60)] == [learning_rate(ramp, step) for step in range(60)]
