"""A source whose images have fewer tiles than the model's rule allows (`config.mixture.TileRule`).

The exported processor has one rule, the model's. A source may only take
tiles away from it: what it trains then are layouts that the processor makes, too, of smaller images. A source with more
tiles would train layouts that no export can make, and is refused.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache

from megatron_haplovl.config.mixture import TileRule
from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data.image_geometry import tile_limit
from megatron_haplovl.data.sources import IndexedSource, Sample, SampleCounts

_MOST_VISUALS = 64


@lru_cache
def narrowed(vision: VisionConfig, rule: TileRule) -> VisionConfig:
    """How a source with this rule is seen.

    Raises:
        ValueError: the rule allows some image more tiles than `vision` does.
    """
    changes = {name: value for name, value in vars(rule).items() if value is not None}
    if not changes:
        return vision
    seen = dataclasses.replace(vision, **changes)
    for number in range(1, _MOST_VISUALS + 1):
        limit, wanted = tile_limit(number, vision), tile_limit(number, seen)
        if wanted > limit:
            raise ValueError(
                f"{rule.words()} would give each of {number} images of a sample up to {wanted} tiles, the model's own "
                f"rule {limit}: the exported processor has that one rule and never makes such an image; lower it, or "
                "raise --max-tiles or --image-token-budget"
            )
    return seen


@dataclass(frozen=True)
class NarrowedSource:
    """A source under a rule of its own."""

    inner: IndexedSource
    rule: TileRule

    @property
    def name(self) -> str:
        """The prefix."""
        return self.inner.name

    @property
    def content_hash(self) -> str:
        """Changes when any sample or the rule changes."""
        return f"{self.inner.content_hash} {self.rule}"

    @property
    def num_samples(self) -> int:
        """Samples, whether they take part or not."""
        return self.inner.num_samples

    def counts(self, vision: VisionConfig) -> SampleCounts:
        """Sizes of all samples."""
        return self.inner.counts(narrowed(vision, self.rule))

    def read(self, index: int) -> Sample:
        """One sample, which carries the rule."""
        return dataclasses.replace(self.inner.read(index), tiles=self.rule)

    def check_files(self) -> None:
        """See :meth:`IndexedSource.check_files`."""
        self.inner.check_files()
