"""Storage of a run's tensors: every rank writes the pieces that it holds, and a run of any layout reads them.

A piece is a run of elements of one flattened tensor, or of one tensor-parallel part of it. It is stored under the
parameter's name in the serial model, so that no layout has to be known to read it. Nothing is pickled.

    rank-00000.safetensors    one rank's pieces
    rank-00000.json           what they are pieces of, and the file's size and SHA-256
    manifest.json             the same for all ranks and for the other files, and every parameter's shape; written last
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_haplovl.checkpoint.manifest import MANIFEST, read_manifest
from megatron_haplovl.checkpoint.safetensors_stream import StoredTensor, read_header
from megatron_haplovl.checkpoint.weight_files import TensorSource, WeightReader

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's moments, by the names that torch and DeepSpeed give them."""


@dataclass(frozen=True)
class Piece:
    """Says which elements of which tensor a stretch of a file holds."""

    name: str
    """The parameter's name."""
    kind: str
    """WEIGHT or one of MOMENTS."""
    dim: int | None
    """Dimension along which tensor-parallel ranks share the tensor; None if every rank holds it whole."""
    part: int
    parts: int
    start: int
    """Place of the first element in the flattened part."""
    length: int


@dataclass(frozen=True)
class _Stored:
    piece: Piece
    file: str
    key: str


class PieceReader:
    """Reads the tensors of a checkpoint, whole or in parts, whichever ranks wrote it.

    Args:
        folder: one checkpoint's folder.

    Raises:
        ValueError: there is no readable manifest.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        self._dtype: torch.dtype = getattr(torch, manifest["dtype"])
        self._shapes = {name: torch.Size(shape) for name, shape in manifest["parameters"].items()}
        self._stored: dict[tuple[str, str], list[_Stored]] = defaultdict(list)
        for record in manifest["files"]:
            for i, values in enumerate(record["pieces"]):
                piece = Piece(**values)
                self._stored[piece.name, piece.kind].append(_Stored(piece, record["file"], str(i)))
        self._headers: dict[str, dict[str, StoredTensor]] = {}

    def names(self) -> list[str]:
        """Names of all parameters, sorted."""
        return sorted(self._shapes)

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter in the serial model.

        Raises:
            ValueError: there is no parameter of this name.
        """
        if name not in self._shapes:
            raise ValueError(f"{self.folder}: there is no tensor {name!r} among its {len(self._shapes)}")
        return tuple(self._shapes[name])

    def has(self, name: str, kind: str) -> bool:
        """Whether there is such a tensor: frozen parameters have no moments."""
        return (name, kind) in self._stored

    def get(self, name: str, kind: str = WEIGHT) -> torch.Tensor:
        """A whole tensor; a weight as the model computed with it, a moment as it is stored."""
        whole = self._whole(name, kind)
        return whole.to(self._dtype) if kind == WEIGHT else whole

    def read(self, piece: Piece) -> torch.Tensor:
        """The elements that a piece names, flat, as they are stored."""
        stored = self._stored_of(piece.name, piece.kind)
        if (stored[0].piece.dim, stored[0].piece.parts) == (piece.dim, piece.parts):
            return self._read(stored, piece.part, piece.start, piece.length)
        # The number of tensor-parallel ranks has changed.
        whole = self._whole(piece.name, piece.kind)
        mine = whole if piece.dim is None else whole.chunk(piece.parts, piece.dim)[piece.part]
        return mine.reshape(-1)[piece.start : piece.start + piece.length]

    def _whole(self, name: str, kind: str) -> torch.Tensor:
        """A whole tensor, put together from the parts of all tensor-parallel ranks, as it is stored."""
        shape = self.shape(name)
        stored = self._stored_of(name, kind)
        dim, parts = stored[0].piece.dim, stored[0].piece.parts
        part_shape = torch.Size(n // parts if i == dim else n for i, n in enumerate(shape))
        slices = [self._read(stored, part, 0, part_shape.numel()).view(part_shape) for part in range(parts)]
        return slices[0] if dim is None else torch.cat(slices, dim)

    def _stored_of(self, name: str, kind: str) -> list[_Stored]:
        if (name, kind) not in self._stored:
            raise ValueError(f"{self.folder}: has no {kind} of {name}")
        return self._stored[name, kind]

    def _read(self, stored: Iterable[_Stored], part: int, start: int, length: int) -> torch.Tensor:
        """Elements of a flattened part, put together from the pieces that hold some of them."""
        result: torch.Tensor | None = None
        found = 0
        for item in stored:
            piece = item.piece
            first, end = max(start, piece.start), min(start + length, piece.start + piece.length)
            if piece.part != part or first >= end:
                continue
            values = self._stored_values(item).read(first - piece.start, end - piece.start)
            if result is None:
                result = torch.empty(length, dtype=values.dtype)
            result[first - start : end - start] = values
            found += end - first
        if result is None or found != length:
            name = next(iter(stored)).piece.name
            raise ValueError(f"{self.folder}: {found} of {length} elements of {name} are there")
        return result

    def _stored_values(self, item: _Stored) -> StoredTensor:
        tensor = self._header(item.file).get(item.key)
        if tensor is None or tensor.count != item.piece.length:
            raise ValueError(
                f"{self.folder / item.file}: its header and {MANIFEST} disagree about piece {item.key} "
                f"({item.piece.length} elements of {item.piece.name})"
            )
        return tensor

    def _header(self, file: str) -> dict[str, StoredTensor]:
        if file not in self._headers:
            self._headers[file] = read_header(self.folder / file)
        return self._headers[file]


def open_checkpoint(folder: str | Path) -> TensorSource:
    """The weights of a checkpoint, either one that a run has saved or one of plain safetensors.

    Raises:
        ValueError: the folder holds neither.
    """
    return PieceReader(folder) if (Path(folder) / MANIFEST).is_file() else WeightReader(folder)
