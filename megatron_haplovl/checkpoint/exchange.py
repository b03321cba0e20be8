"""Files that lie on one machine only are sent to those that lack them, rank to rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_haplovl.checkpoint.files import to_disk
from megatron_haplovl.checkpoint.manifest import file_digest
from megatron_haplovl.parallel.groups import Group

_CHUNK = 16 * 1024 * 1024


@dataclass(frozen=True)
class Shipment:
    """Files that one rank sends to another."""

    files: tuple[tuple[str, int, str], ...]
    """Name, bytes and SHA-256 of each."""

    def chunks(self) -> Iterator[tuple[int, int, int]]:
        """Number of the file, place and length of every message."""
        for i, (_, size, _) in enumerate(self.files):
            for start in range(0, size, _CHUNK):
                yield i, start, min(_CHUNK, size - start)


def plan_shipments(
    files: Mapping[str, Mapping[str, Any]], held: Mapping[int, set[str]]
) -> dict[tuple[int, int], Shipment]:
    """Who sends what to whom, so that every holder ends with all files.

    Args:
        files: name -> its record, of all that are wanted.
        held: rank -> names of the files that it has.

    Returns:
        (sender, receiver) -> files; a file is sent by the first rank that has it.
    """
    planned: dict[tuple[int, int], list[tuple[str, int, str]]] = {}
    for name, record in files.items():
        source = min(rank for rank, names in held.items() if name in names)
        for receiver, names in held.items():
            if name not in names:
                planned.setdefault((source, receiver), []).append((name, record["bytes"], record["sha256"]))
    return {pair: Shipment(tuple(items)) for pair, items in planned.items()}


def ship(folder: Path, shipments: Mapping[tuple[int, int], Shipment], ranks: tuple[int, ...], control: Group) -> str:
    """Send and receive this rank's shipments. Called by every rank of `ranks`, others may call it, too.

    In each round every rank sends to one other and receives from one, so that all links are in use. What goes wrong is
    told at the end, because a rank that stopped would leave another waiting.

    Args:
        folder: where this rank's files are, and where those go that it receives.
        shipments: of all ranks.
        ranks: those that send or receive, in the same order on all.
        control: carries the messages.

    Returns:
        What went wrong on this rank, or nothing.
    """
    if control.rank not in ranks:
        return ""
    place, errors = ranks.index(control.rank), []
    for shift in range(1, len(ranks)):
        to, source = ranks[(place + shift) % len(ranks)], ranks[(place - shift) % len(ranks)]
        outgoing = shipments.get((control.rank, to), Shipment(()))
        incoming = shipments.get((source, control.rank), Shipment(()))
        errors += _exchange(folder, outgoing, to, incoming, source, control)
    return "; ".join(errors)


def _exchange(folder: Path, outgoing: Shipment, to: int, incoming: Shipment, source: int, control: Group) -> list[str]:
    errors: list[str] = []
    out, into = list(outgoing.chunks()), list(incoming.chunks())
    for i in range(max(len(out), len(into))):
        sending, sent = None, None
        if i < len(out):
            sent = _read(folder / outgoing.files[out[i][0]][0], *out[i][1:], errors)
            sending = dist.isend(sent, to, group=control.process_group)
        if i < len(into):
            received = torch.empty(into[i][2], dtype=torch.uint8)
            dist.recv(received, source, group=control.process_group)
            _write(_aside(folder, incoming.files[into[i][0]][0]), into[i][1], received, errors)
        if sending is not None:
            sending.wait()
    for name, size, digest in incoming.files:
        try:
            aside = _aside(folder, name)
            if size == 0:
                aside.touch()
            if file_digest(aside) != digest:
                raise OSError(f"{aside} did not arrive as it was sent")
            to_disk(aside)
            aside.rename(folder / name)
        except OSError as error:
            errors.append(str(error))
    return errors


def _aside(folder: Path, name: str) -> Path:
    return folder / f"unfinished-{name}"


def _read(path: Path, start: int, length: int, errors: list[str]) -> torch.Tensor:
    """A piece of a file; zeros if it cannot be read, which the receiver finds by the checksum."""
    values = torch.zeros(length, dtype=torch.uint8)
    try:
        with path.open("rb") as file:
            file.seek(start)
            file.readinto(values.numpy().data)
    except OSError as error:
        errors.append(str(error))
    return values


def _write(path: Path, start: int, values: torch.Tensor, errors: list[str]) -> None:
    """Append to a file; after an error the rest is let go."""
    if errors:
        return
    try:
        with path.open("wb" if start == 0 else "ab") as file:
            file.write(values.numpy().data)
    except OSError as error:
        errors.append(str(error))
