"""The work in a micro-batch: counts of tokens, patches and visible pairs, exact or expected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_haplovl.config.stages import StageSpec
from megatron_haplovl.data.batch import IGNORE_INDEX, Batch
from megatron_haplovl.data.image_geometry import VisualLayout


@dataclass(frozen=True)
class Work:
    """What one micro-batch holds, over all ranks that share it. Averages may be fractions."""

    tokens: float
    """Positions, padding included."""
    pairs: float
    """(query, key) pairs under the mixed mask."""
    patches: float
    """Patch tokens, newlines not counted."""
    tiles: float
    """Image tiles that the vision teacher sees."""
    head_tokens: float
    """Tokens whose vocabulary logits are computed: those with a label in stage 2, all text tokens in stage 1."""

    def __add__(self, other: Work) -> Work:
        return Work(*(ours + theirs for ours, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, factor: float) -> Work:
        return Work(*(factor * value for value in vars(self).values()))


def work_of_batch(batch: Batch, stage: StageSpec) -> Work:
    """Count a real micro-batch."""
    head_tokens_BS = {"text_tokens": batch.text_mask_BS, "lm_tokens": batch.labels_BS != IGNORE_INDEX}
    return Work(
        tokens=batch.tokens_BS.numel(),
        pairs=batch.visible_pairs,
        patches=batch.patch_target_P.numel(),
        tiles=batch.tiles_TCHW.shape[0],
        head_tokens=int(head_tokens_BS[stage.head_tokens].sum()),
    )


def work_of_sequence(
    seq_length: int,
    *,
    visuals: Sequence[VisualLayout],
    text: int,
    trained: int,
    image_attention: str = "bidirectional",
) -> Work:
    """A packed sequence of as many equal documents as fit, the rest padding.

    Args:
        seq_length: positions.
        visuals: the images and videos of a document.
        text: text tokens of a document.
        trained: text tokens with logits.
        image_attention: as in the model's configuration.

    Raises:
        ValueError: a document is longer than the sequence, or trains more tokens than it has.
    """
    length = text + sum(visual.num_tokens for visual in visuals)
    if not 0 < length <= seq_length:
        raise ValueError(f"a document of {length} tokens does not fit a sequence of {seq_length}")
    if not 0 <= trained <= text:
        raise ValueError(f"{trained} trained tokens of {text} text tokens")
    pairs = length * (length + 1) / 2
    if image_attention == "bidirectional":
        # The tokens of an image or of a frame see its later ones, too.
        blocks = [block.num_tokens for visual in visuals for block in visual.blocks]
        pairs += sum(n * (n - 1) / 2 for n in blocks)
    documents = seq_length // length
    padding = seq_length - documents * length
    return Work(
        tokens=seq_length,
        pairs=documents * pairs + padding,
        patches=documents * sum(visual.num_patches for visual in visuals),
        tiles=documents * sum(visual.num_tiles for visual in visuals),
        head_tokens=documents * trained,
    )
