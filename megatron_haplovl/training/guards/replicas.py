"""Whether ranks that hold the same weights still do, bit for bit."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_haplovl.checkpoint.pieces import WEIGHT
from megatron_haplovl.engine.engine_state import local_pieces, make_optimizer_state
from megatron_haplovl.parallel.groups import Group, ParallelGroups
from megatron_haplovl.parallel.sharded_model import ShardedModel
from megatron_haplovl.parallel.tensor_parallel import split_dim
from megatron_haplovl.training.guards.bits import fingerprints

Key = tuple[str, str]
"""A parameter, and which of its copies belong together."""
Prints = dict[Key, tuple[int, int]]


@dataclass(frozen=True)
class Disagreement:
    """A parameter that is not the same on all ranks that hold it."""

    parameter: str
    wrong: tuple[int, ...]
    """Ranks whose copy is wrong; all that hold it where nothing says which is."""
    is_known: bool
    """Whether a majority or the master weights say which copy is wrong."""
    parameters: int
    """Parameters that differ, this one included."""

    @property
    def words(self) -> str:
        """For a sentence."""
        others = f" (and {self.parameters - 1} more)" if self.parameters > 1 else ""
        ranks = ", ".join(map(str, self.wrong))
        if not self.is_known:
            return (
                f"{self.parameter}{others} differs between the ranks {ranks}, and nothing says which of them is right"
            )
        one = len(self.wrong) == 1
        return (
            f"{self.parameter}{others} on rank{'' if one else 's'} {ranks} differs from the other ranks' cop"
            f"{'y' if one and not others else 'ies'}; that points to the memory of {'its' if one else 'their'} machine"
        )


class Replicas:
    """What this rank holds that others hold, too.

    Args:
        engine: the DeepSpeed engine.
        model: what it trains.
    """

    def __init__(self, engine: Any, model: ShardedModel) -> None:
        self._engine, self._model, self._groups = engine, model, model.groups
        self._zero_stage = int(engine.zero_optimization_stage())

    def describe(self, interval: int) -> str:
        """For the log's first lines: what is compared, or why nothing is."""
        groups, held = self._groups, list(self._held())
        if groups.world.size == 1:
            return "--check-replicas: a single rank, so nothing is compared"
        if not held:
            why = "ZeRO 3 holds every weight once" if self._zero_stage == 3 else "every weight is on one rank only"
            return f"--check-replicas: {why}, so nothing is compared"
        size = sum(tensor.numel() * tensor.element_size() for _, tensor in held)
        over = _voters(groups, whole=True, zero_stage=self._zero_stage)
        return (
            f"--check-replicas: every {interval} steps and before every save, {len(held)} parameters of this rank "
            f"({size / 2**20:.1f} MiB) are compared with those of up to {over - 1} other ranks"
            + (", those that tensor-parallel ranks hold whole; ZeRO 3 holds the others once" * (self._zero_stage == 3))
        )

    def compare(self) -> Disagreement | None:
        """Look for a difference. Called by every rank; the answer is the same on all."""
        control = self._groups.control
        held = list(self._held())
        prints: Prints = dict(zip([key for key, _ in held], fingerprints([t for _, t in held]), strict=True))
        # Most of the time all agree, and a few words from each rank say so.
        digests = control.gather_objects(_digests(prints))
        together: dict[str, set[str]] = defaultdict(set)
        for found in digests:
            for copies, digest in found.items():
                together[copies].add(digest)
        if all(len(found) == 1 for found in together.values()):
            return None
        return self._disagreement(control, prints)

    def _disagreement(self, control: Group, prints: Prints) -> Disagreement:
        votes: dict[Key, dict[int, tuple[int, int]]] = defaultdict(dict)
        for rank, found in enumerate(control.gather_objects(prints)):
            for key, value in found.items():
                votes[key][rank] = value
        split = [key for key, by_rank in votes.items() if len(set(by_rank.values())) > 1]
        key, parameters = split[0], len({parameter for parameter, _ in split})
        by_rank = votes[key]
        value, number = Counter(by_rank.values()).most_common(1)[0]
        if 2 * number > len(by_rank):
            wrong = tuple(rank for rank in by_rank if by_rank[rank] != value)
        else:
            wrong = self._unlike_masters(control, key, prints)
        known = bool(wrong) and len(wrong) < len(by_rank)
        return Disagreement(key[0], wrong if known else tuple(by_rank), known, parameters)

    def _unlike_masters(self, control: Group, key: Key, prints: Prints) -> tuple[int, ...]:
        """Ranks whose copy is not what the optimizer's fp32 weights become (ZeRO 1, 2)."""
        mine = next((tensor.view(-1) for other, tensor in self._held() if other == key), None)
        masters: dict[tuple[int, int], tuple[int, int]] = {}
        if mine is not None and self._zero_stage in (1, 2):
            make_optimizer_state(self._engine, None)
            pieces = [
                local
                for local in local_pieces(self._engine, self._model)
                if local.piece.kind == WEIGHT and local.piece.name == key[0]
            ]
            values = fingerprints([local.values.to(mine.dtype).to(mine.device) for local in pieces])
            places = [(local.piece.start, local.piece.length) for local in pieces]
            masters = dict(zip(places, values, strict=True))
        everybody = control.gather_objects((key in prints, masters))
        known = [place for holds, found in everybody if holds for place in found.items()]
        unlike = False
        if mine is not None:
            copies = fingerprints([mine.narrow(0, start, length) for (start, length), _ in known])
            unlike = any(copy != value for copy, (_, value) in zip(copies, known, strict=True))
        return tuple(rank for rank, found in enumerate(control.gather_objects(unlike)) if found)

    def _held(self) -> Iterator[tuple[Key, torch.Tensor]]:
        """What at least one other rank holds, too."""
        groups = self._groups
        for name, parameter in self._model.module.named_parameters():
            whole = groups.tensor.size == 1 or split_dim(name) is None
            if _voters(groups, whole=whole, zero_stage=self._zero_stage) == 1:
                continue
            copies = f"pipeline {groups.pipeline.rank}"
            if not whole:
                copies += f", tensor {groups.tensor.rank}"
            if self._zero_stage == 3:
                # ZeRO 3 has given each replica another part of the parameter.
                yield (name, f"{copies}, replica {groups.replicas.rank}"), parameter.ds_tensor.detach()  # type: ignore[attr-defined]
            else:
                yield (name, copies), parameter.detach()


def _voters(groups: ParallelGroups, *, whole: bool, zero_stage: int) -> int:
    """How many ranks hold the same: the replicas, and what is whole all tensor-parallel ranks, too."""
    return (groups.tensor.size if whole else 1) * (1 if zero_stage == 3 else groups.replicas.size)


def _digests(prints: Prints) -> dict[str, str]:
    """One for all parameters whose copies belong together."""
    hashes: dict[str, Any] = {}
    for (name, copies), value in prints.items():
        hashes.setdefault(copies, hashlib.sha256()).update(f"{name} {value}".encode())
    return {copies: found.hexdigest() for copies, found in hashes.items()}
