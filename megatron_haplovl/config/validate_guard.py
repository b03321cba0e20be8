"""Checks of the section "guard"."""

from __future__ import annotations

from megatron_haplovl.config.bounds import check_at_least_1
from megatron_haplovl.config.schema import Config, GuardConfig


def validate_guard(config: Config) -> None:
    """Check what is to be looked at in a step.

    Raises:
        ValueError: the first contradiction found.
    """
    guard, usual = config.guard, GuardConfig()
    for step in guard.iterations_to_skip:
        if step < 1:
            raise ValueError(f"--iterations-to-skip counts steps from 1, as the log does; {step} is none")
    if guard.max_skipped_steps < 0:
        raise ValueError(f"--max-skipped-steps must be at least 0, got {guard.max_skipped_steps}")
    if guard.max_skipped_steps and not guard.check_for_nan_in_loss_and_grad:
        raise ValueError(
            f"--max-skipped-steps {guard.max_skipped_steps} leaves out what --no-check-for-nan-in-loss-and-grad does "
            "not look for; leave one of them out"
        )
    check_at_least_1(guard, "check_replicas")
    for name in ("spiky_loss_factor", "spiky_loss_action"):
        value = getattr(guard, name)
        if value != getattr(usual, name) and not guard.check_for_spiky_loss:
            raise ValueError(f"--{name.replace('_', '-')} {value} is for --check-for-spiky-loss; give that, too")
    if guard.spiky_loss_factor <= 1:
        raise ValueError(f"--spiky-loss-factor must be above 1, got {guard.spiky_loss_factor}")
    checkpoint = config.checkpoint
    if guard.spiky_loss_action == "return" and (checkpoint.save is None or checkpoint.load != checkpoint.save):
        raise ValueError(
            "--spiky-loss-action return goes back to the run's last checkpoint; give --save, and --load with the same "
            "folder"
        )
