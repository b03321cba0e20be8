"""Checks of what observes a run: profiler, garbage collection, columns."""

from __future__ import annotations

from megatron_haplovl.config.schema import Config


def validate_profile(config: Config) -> None:
    """Check the settings of sections `profile` and `run`, and of the log's columns.

    Raises:
        ValueError: the first contradiction found.
    """
    profile, run = config.profile, config.run
    if not 0 <= profile.profile_step_start < profile.profile_step_end:
        raise ValueError(
            f"--profile-step-start {profile.profile_step_start} must be at least 0 and less than --profile-step-end "
            f"{profile.profile_step_end}"
        )
    if any(rank < 0 for rank in profile.profile_ranks):
        raise ValueError(f"--profile-ranks must be at least 0, got {' '.join(map(str, profile.profile_ranks))}")
    if profile.profile and profile.profile_dir is None and config.checkpoint.save is None:
        raise ValueError("--profile writes to the folder profile in --save; give --save or --profile-dir")
    if profile.record_memory_history and not profile.profile:
        raise ValueError("--record-memory-history records the steps of --profile; give that, too")
    if run.manual_gc_interval < 0:
        raise ValueError(f"--manual-gc-interval must be at least 0, got {run.manual_gc_interval}")
    if not run.manual_gc and (run.manual_gc_interval or not run.manual_gc_eval):
        raise ValueError("--manual-gc-interval and --no-manual-gc-eval need --manual-gc")
    peak = config.logging.device_peak_tflops
    if peak is not None and peak <= 0:
        raise ValueError(f"--device-peak-tflops must be above 0, got {peak}")
