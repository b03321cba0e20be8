"""Read every sample of a prefix, and compare what the files say about each other.

Shape letters: N samples, I images.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_haplovl.data import manifest as names
from megatron_haplovl.data.array_file import read_array
from megatron_haplovl.data.image_references import split_references
from megatron_haplovl.data.indexed_dataset import IndexedDataset
from megatron_haplovl.data.manifest import Counts, Manifest
from megatron_haplovl.data.sample_hash import sample_hash

_SHOWN = 5


class ProblemList:
    """The first few problems of a kind, and how many more there are."""

    def __init__(self) -> None:
        self._shown: list[str] = []
        self._more = 0

    def add(self, problem: str) -> None:
        """Show it, or count it."""
        if len(self._shown) < _SHOWN:
            self._shown.append(problem)
        else:
            self._more += 1

    def all(self) -> tuple[str, ...]:
        """What was added."""
        return (*self._shown, *([f"and {self._more} more"] if self._more else []))


def check_contents(prefix: str, manifest: Manifest) -> tuple[str, ...]:
    """Check each sample's tokens, mask, references, hash and counts, and the totals of the manifest.

    Args:
        prefix: path without suffix.
        manifest: its manifest.

    Returns:
        What is wrong, samples by their numbers.

    Raises:
        ValueError: a file is missing or cannot be read at all.
    """
    contents = _Contents(prefix, manifest)
    problems = ProblemList()
    if unequal := contents.unequal_files():
        return unequal
    totals = dict.fromkeys((field.name for field in dataclasses.fields(Counts)), 0)
    totals |= {"images": len(contents.images), "image_bytes": int(contents.images.lengths.sum(dtype=np.int64))}
    for number in range(len(contents.tokens)):
        for problem in contents.check_sample(number, totals):
            problems.add(f"sample {number}: {problem}")
    for image in np.flatnonzero((contents.sizes_I2 < 1).any(axis=1)).tolist():
        problems.add(f"image {image} has the size {contents.sizes_I2[image].tolist()}")
    for name, found in totals.items():
        stated = getattr(manifest.counts, name)
        if stated != found:
            problems.add(f"the manifest says counts.{name} {stated}, the files have {found}")
    return problems.all()


class _Contents:
    """The opened files of a prefix."""

    def __init__(self, prefix: str, manifest: Manifest) -> None:
        self._manifest = manifest
        self.tokens, self.loss_mask, self.images, self.references = (
            IndexedDataset(prefix + part) for part in (names.TOKENS, names.LOSS_MASK, names.IMAGES, names.IMAGE_REFS)
        )
        for dataset in (self.tokens, self.loss_mask, self.images, self.references):
            dataset.check_order()  # raises if the sequences do not follow each other
        self.sizes_I2 = read_array(Path(prefix + names.IMAGE_SIZES), np.int32, (len(self.images), 2))
        self._has_hashes = manifest.format_version >= 2
        if self._has_hashes:
            self._digests_I32 = read_digests(prefix, len(self.images))
            samples = (len(self.tokens),)
            self._lm_tokens_N = read_array(Path(prefix + names.SAMPLE_LM_TOKENS), np.int32, samples)
            self._hashes_N = read_array(Path(prefix + names.SAMPLE_HASHES), np.uint64, samples)

    def unequal_files(self) -> tuple[str, ...]:
        """Files that hold another number of samples than the tokens do."""
        count = len(self.tokens)
        others = {names.LOSS_MASK: len(self.loss_mask), names.IMAGE_REFS: len(self.references)}
        return tuple(f"{count} samples, but {other} in {part}" for part, other in others.items() if other != count)

    def check_sample(self, number: int, totals: dict[str, int]) -> list[str]:
        """What is wrong with a sample; its sizes are added to `totals`."""
        token_ids, mask, refs = self.tokens[number], self.loss_mask[number], self.references[number].tolist()
        placeholders = (self._manifest.image_token_id, self._manifest.video_token_id)
        is_visual = np.isin(token_ids, placeholders)
        text = token_ids[~is_visual]
        problems = []
        if len(mask) != len(token_ids):
            problems.append(f"{len(token_ids)} tokens and {len(mask)} entries of the loss mask")
        if int(mask.max(initial=0)) > 1 or mask[:1].any():
            problems.append("its loss mask has other values than 0 and 1, or a 1 at the first token")
        if int(text.min(initial=0)) < 0:
            problems.append(f"the token id {int(text.min())}")
        try:
            visuals = split_references(refs, len(self.images))
        except ValueError as error:
            return [*problems, str(error)]
        kinds = [placeholders[isinstance(visual, list)] for visual in visuals]
        if token_ids[is_visual].tolist() != kinds:
            problems.append(f"{int(is_visual.sum())} placeholders that do not fit its {len(kinds)} images and videos")
        images = [i for visual in visuals for i in (visual if isinstance(visual, list) else (visual,))]
        if self._has_hashes:
            if int(self._lm_tokens_N[number]) != int(mask[1:].sum(dtype=np.int64)):
                problems.append(f"{int(mask[1:].sum(dtype=np.int64))} trained tokens, not {self._lm_tokens_N[number]}")
            if int(self._hashes_N[number]) != sample_hash(token_ids, (self._digests_I32[i].tobytes() for i in images)):
                problems.append("its hash is not that of its tokens and images")
        totals["samples"] += 1
        totals["text_only_samples"] += not visuals
        totals["tokens"] += len(token_ids)
        totals["loss_tokens"] += int(mask.sum(dtype=np.int64))
        totals["image_references"] += len(images)
        totals["videos"] += sum(isinstance(visual, list) for visual in visuals)
        totals["longest_sample"] = max(totals["longest_sample"], len(token_ids))
        totals["largest_token_id"] = max(totals["largest_token_id"], int(text.max(initial=0)))
        return problems


def read_digests(prefix: str, num_images: int) -> npt.NDArray[np.uint8]:
    """The SHA-256 of each image, `[I, 32]`.

    Raises:
        ValueError: the file is damaged, or belongs to other images.
    """
    return read_array(Path(prefix + names.IMAGE_DIGESTS), np.uint8, (num_images, 32))
