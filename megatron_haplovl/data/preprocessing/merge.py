"""Several prefixes become one: samples one behind the other, images that are alike stored once.

Parts of one preprocessing and the prefixes of several machines are joined by the same code. Images are compared by the
digests that were computed when they were read, and the kernel copies them: this program reads none of them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_haplovl.data import manifest as names
from megatron_haplovl.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, bin_path
from megatron_haplovl.data.manifest import Manifest, Origin
from megatron_haplovl.data.preprocessing.prefix_writer import SUMS, PrefixFiles

_NOTHING: dict[str, npt.NDArray] = {
    names.IMAGE_SIZES: np.zeros((0, 2), dtype=np.int32),
    names.IMAGE_DIGESTS: np.zeros((0, 32), dtype=np.uint8),
    names.SAMPLE_LM_TOKENS: np.zeros(0, dtype=np.int32),
    names.SAMPLE_HASHES: np.zeros(0, dtype=np.uint64),
}


class PrefixJoiner(PrefixFiles):
    """Writes a prefix from others, in the order in which they are added. A context manager.

    Args:
        prefix: the prefix to write.
        origin: what made the samples; the first prefix says it if it is not given.

    Raises:
        OSError: a file cannot be written.
    """

    def __init__(self, prefix: str | Path, origin: Origin | None = None) -> None:
        super().__init__(prefix)
        self._arrays: dict[str, list[npt.NDArray]] = {suffix: [empty] for suffix, empty in _NOTHING.items()}
        self._origin = origin
        self._num_frames: int | None = None

    def add(self, prefix: str, manifest: Manifest) -> None:
        """Append the samples of a prefix.

        Raises:
            ValueError: it was made with another tokenizer, template or number of frames, or a file is damaged.
        """
        self._check(prefix, manifest)
        self._append(prefix + names.TOKENS, self._tokens, manifest, names.TOKENS)
        self._append(prefix + names.LOSS_MASK, self._loss_mask, manifest, names.LOSS_MASK)
        new_ids, is_new = self._add_images(prefix)
        references = IndexedDataset(prefix + names.IMAGE_REFS)
        flat = _checked(references, prefix, manifest, names.IMAGE_REFS)
        if len(flat) and (len(new_ids) == 0 or int(flat.max()) >= len(new_ids)):
            raise ValueError(f"{prefix}: a sample refers to an image that does not exist; preprocess again")
        # A negative number stands for the length of a video and not for an image.
        flat = np.where(flat >= 0, new_ids[np.maximum(flat, 0)], flat) if len(flat) else flat
        self._image_refs.extend(flat.astype(np.int32), references.lengths)
        for suffix, arrays in self._arrays.items():
            array = np.load(prefix + suffix, allow_pickle=False)
            arrays.append(array[is_new] if suffix in (names.IMAGE_SIZES, names.IMAGE_DIGESTS) else array)
        counts = manifest.counts
        # Not the bytes of images: those that are there already are not stored again.
        self._totals.update({name: getattr(counts, name) for name in SUMS if name != "image_bytes"})
        self._longest = max(self._longest, counts.longest_sample)
        self._largest_id = max(self._largest_id, counts.largest_token_id)
        self._skipped.update(manifest.skipped)
        self._repairs.update(manifest.repairs)
        self._unread_keys.update(manifest.unread_keys)
        self._left_out.update(manifest.left_out)

    def _check(self, prefix: str, manifest: Manifest) -> None:
        if manifest.format_version < names.FORMAT_VERSION:
            raise ValueError(f"{prefix} has format version {manifest.format_version}; preprocess it again to join it")
        self._origin = self._origin or manifest.origin
        for name, first in vars(self._origin).items():
            if getattr(manifest, name) != first:
                raise ValueError(f"{prefix} has {name} {getattr(manifest, name)}, those before it {first}")
        if manifest.num_frames is not None:
            self._num_frames = self._num_frames or manifest.num_frames
            if manifest.num_frames != self._num_frames:
                raise ValueError(
                    f"{prefix} has videos of {manifest.num_frames} frames, those before it of {self._num_frames}"
                )

    def _append(self, path: str, writer: IndexedDatasetWriter, manifest: Manifest, part: str) -> None:
        dataset = IndexedDataset(path)
        writer.extend(_checked(dataset, path, manifest, part), dataset.lengths)

    def _add_images(self, prefix: str) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """New numbers of the images of a prefix, and which of them were not there before."""
        digests = np.load(prefix + names.IMAGE_DIGESTS, allow_pickle=False).tobytes()
        images = IndexedDataset(prefix + names.IMAGES)
        total, before = len(images), len(self._image_ids)
        if len(digests) != 32 * total:
            raise ValueError(f"{prefix} has {len(digests) // 32} digests for {total} images; preprocess again")
        images.check_order()
        ids = self._image_ids
        new_ids = np.fromiter(
            (ids.setdefault(digests[i : i + 32], len(ids)) for i in range(0, 32 * total, 32)), np.int32, total
        )
        is_new = new_ids >= before
        if int(is_new.sum()) != len(ids) - before:
            raise ValueError(f"{prefix} has the same image twice; preprocess again")
        edges = np.flatnonzero(np.diff(is_new, prepend=False, append=False))
        starts, lengths = images.starts(), images.lengths
        with bin_path(prefix + names.IMAGES).open("rb", buffering=0) as source:
            for first, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
                self._images.copy(source, int(starts[first]), lengths[first:stop])
        self._totals["image_bytes"] += int(lengths[is_new].sum(dtype=np.int64))
        return new_ids, is_new

    def finish(self) -> Manifest:
        """Complete the files and write the manifest, last."""
        assert self._origin is not None
        arrays = {suffix: np.concatenate(arrays) for suffix, arrays in self._arrays.items()}
        return self._complete(arrays, self._origin, self._num_frames)


def _checked(dataset: IndexedDataset, path: str, manifest: Manifest, part: str) -> npt.NDArray[Any]:
    """All numbers of a file, compared with its checksum."""
    flat = dataset.flat()
    if hashlib.sha256(flat.data).hexdigest() != manifest.files[f"{part}.bin"].sha256:
        raise ValueError(
            f"{path}: the numbers do not have the checksum in the manifest; remove it and preprocess again"
        )
    return flat


def publish(aside: str | Path, prefix: str | Path) -> None:
    """Give complete files their names, the manifest last.

    Files without a manifest cannot be read, so nobody ever reads a mixture of old and new files.
    """
    Path(f"{prefix}{names.MANIFEST_SUFFIX}").unlink(missing_ok=True)
    for suffix in (*names.DATA_SUFFIXES, names.MANIFEST_SUFFIX):
        os.replace(f"{aside}{suffix}", f"{prefix}{suffix}")


def join_reports(parts: Iterable[str], path: Path) -> None:
    """Write the report of joined prefixes.

    Raises:
        ValueError: a prefix has no report.
        OSError: it cannot be written.
    """
    aside = path.with_name(f".{path.name}.aside")
    try:
        with aside.open("wb") as target:
            for prefix in parts:
                report = Path(prefix + names.REPORT_SUFFIX)
                if not report.is_file():
                    raise ValueError(f"{report} does not exist; it belongs to the prefix {prefix}")
                with report.open("rb") as source:
                    shutil.copyfileobj(source, target)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
