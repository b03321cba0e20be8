"""Rank program: something that is not finite, in every layout of two ranks; reports what the step raised and changed.

Words: a folder for the answers, then the names of layouts (see `LAYOUTS`; default: all).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_haplovl.config.schema import Config
from megatron_haplovl.engine.engine_state import local_pieces, make_optimizer_state
from megatron_haplovl.operation.endings import RunEnd
from megatron_haplovl.training.guards.build import build_guard
from megatron_haplovl.training.setup import Run, setup
from megatron_haplovl.training.step import train_step
from tests.distributed.cases import config
from tests.distributed.topology import forget_topology

_MODES: dict[str, dict[str, Any]] = {
    **{f"DP 2, ZeRO {z}": {"parallel__zero_stage": z} for z in (0, 1, 2, 3)},
    "CP 2, ZeRO 1": {"parallel__context_parallel_size": 2},
    "TP 2, ZeRO 0": {"parallel__tensor_model_parallel_size": 2, "parallel__zero_stage": 0},
    "TP 2 + SP, ZeRO 3": {
        "parallel__tensor_model_parallel_size": 2,
        "parallel__sequence_parallel": True,
        "parallel__zero_stage": 3,
    },
    **{f"PP 2, ZeRO {z}": {"parallel__pipeline_model_parallel_size": 2, "parallel__zero_stage": z} for z in (0, 1)},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    f"{name}, {'bf16' if bf16 else 'fp32'}": {**mode, "precision__bf16": bf16}
    for name, mode in _MODES.items()
    for bf16 in (False, True)
} | {
    f"DP 2, ZeRO {z}, bf16, offloaded": {
        "parallel__zero_stage": z,
        "precision__bf16": True,
        "parallel__offload_optimizer": "cpu",
    }
    for z in (1, 2, 3)
}
"""Every way in which two ranks share the work, by name."""
ACCUMULATION = 2
MICRO_BATCH = 1
"""The micro-batch that is hit, counted from 0."""


def in_output(run: Run) -> Callable[[], None]:
    """On rank 1, an output is not finite for one micro-batch of step 2, whenever it is computed."""
    module = dict(run.model.module.named_modules())["post_decoder.1.mlp.up_proj"]
    hit = run.train_data.packs(run.train_data.numbers(1)[MICRO_BATCH])
    is_hit = [False]
    original = run.model.module.attention_inputs

    def attention_inputs(start: torch.Tensor, end: torch.Tensor, positions: torch.Tensor) -> Any:
        # The mask tells micro-batches apart, on every stage of a pipeline.
        is_hit[0] = torch.equal(end.cpu(), hit.kv_end_BS) and torch.equal(start.cpu(), hit.kv_start_BS)
        return original(start, end, positions)

    def spoil(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        return output * float("nan") if is_hit[0] else None

    run.model.module.attention_inputs = attention_inputs  # type: ignore[method-assign,assignment]
    handle = module.register_forward_hook(spoil)
    return handle.remove


def in_weight(run: Run) -> Callable[[], None]:
    """A weight of rank 1 is not finite."""
    parameter = dict(run.model.module.named_parameters()).get("final_norm.weight")
    if parameter is None:  # on another stage of a pipeline
        return lambda: None
    # ZeRO 3 keeps a small parameter whole beside its parts.
    held = [
        values.data.view(-1) for values in (parameter, getattr(parameter, "ds_tensor", parameter)) if values.numel()
    ]
    before = [values[-1].clone() for values in held]
    if dist.get_rank() == 1:
        for values in held:
            values[-1] = float("inf")

    # The others may have gathered it.
    def mend() -> None:
        for values, value in zip(held, before, strict=True):
            values[-1] = value

    return mend


def in_gradient(run: Run) -> Callable[[], None]:
    """Rank 1's second gradient of a step is not finite for one parameter, though the losses are."""
    parameter = dict(run.model.module.named_parameters())["final_norm.weight"]
    calls = itertools.count()

    def spoil(gradient: torch.Tensor) -> torch.Tensor | None:
        return gradient * float("inf") if next(calls) % ACCUMULATION == MICRO_BATCH else None

    return parameter.register_hook(spoil).remove


KINDS: dict[str, Callable[[Run], Callable[[], None]]] = {
    "output": in_output,
    "weight": in_weight,
    "gradient": in_gradient,
}


@contextlib.contextmanager
def fault(run: Run, kind: str) -> Iterator[None]:
    undo = KINDS[kind](run) if dist.get_rank() == 1 or kind == "weight" else (lambda: None)
    try:
        yield
    finally:
        if run.config.parallel.zero_stage == 3:
            # What was gathered is forgotten, and gathered anew from the parts.
            run.engine.empty_partition_cache()
        undo()


def state_of(run: Run) -> dict[str, torch.Tensor]:
    """Weights, moments and AdamW's number of steps, of this rank."""
    found = {
        f"{local.piece.name} {local.piece.kind}": local.values.clone() for local in local_pieces(run.engine, run.model)
    }
    found |= {name: getattr(p, "ds_tensor", p).detach().clone() for name, p in run.model.module.named_parameters()}
    states = run.engine.basic_optimizer.state.values()
    return found | {f"step {i}": torch.as_tensor(float(s["step"])) for i, s in enumerate(states)}


def attempt(run: Run, step: int, kind: str) -> dict[str, Any]:
    """A step with a fault in it: how it ended, and what it has changed on this rank."""
    make_optimizer_state(run.engine, None)
    before = state_of(run)
    # The clock's own iterator has workers; these are read in this process.
    batches = map(run.train_data.packs, run.train_data.numbers(step) if run.steps.reads_data else ())
    with fault(run, kind):
        try:
            found: dict[str, Any] = {"updated": train_step(run, step, batches).updated}
        except RunEnd as end:
            found = {"message": str(end), "code": int(end.ending.code), "cause": end.ending.cause}
    after = state_of(run)
    found["changed"] = [key for key, value in after.items() if not torch.equal(value, before[key])]
    return found


def patient(run: Run, settings: Config) -> Run:
    """The same run with --max-skipped-steps 1."""
    guard = dataclasses.replace(settings.guard, max_skipped_steps=1)
    changed = dataclasses.replace(settings, guard=guard)
    parts = (run.engine, run.model, run.steps, run.terms, run.train_data, run.device)
    return dataclasses.replace(run, guard=build_guard(changed, *parts, run_id="", state={}))


def main(folder: Path, *chosen: str) -> None:
    found: dict[str, Any] = {}
    for name in chosen or LAYOUTS:
        forget_topology()
        sizes = {"schedule__global_batch_size": 4 if "DP" in name else 2, "schedule__train_iters": 4}
        settings = config("full", **LAYOUTS[name], **sizes, checkpoint__save=str(folder / name))
        run = setup(settings)
        # Something in the moments that could be lost.
        train_step(run, 0, run.train_data.micro_batches())
        for kind in ("output", "weight", "gradient"):
            found[f"{name}: {kind}"] = attempt(run, 1, kind)
        run = patient(run, settings)
        for kind in ("gradient, once", "gradient, twice"):
            found[f"{name}: {kind}"] = attempt(run, 1, "gradient")
        found[f"{name}: counts"] = [run.guard.skipped, run.guard.not_finite]
        found[f"{name}: after"] = train_step(run, 1, map(run.train_data.packs, run.train_data.numbers(1))).losses
        print(f"{name}: done", flush=True)
        (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
