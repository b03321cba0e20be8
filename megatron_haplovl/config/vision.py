"""What decides how an image becomes tokens."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_haplovl.config.setting import setting


@dataclass(frozen=True)
class VisionConfig:
    """How an image becomes tokens (paper Sec. 3.1, "multi-modal embedding layers")."""

    patch_size: int = setting(14, "side of the square pixel window that one token embeds")
    image_size: int = setting(336, "side of one tile in pixels; a multiple of --patch-size")
    image_aspect_ratio: str = setting(
        "pad",
        "pad: one tile, the image padded to a square; resize: one tile, the image stretched; "
        "anyres: as many tiles as the best of the grid pinpoints holds",
        choices=("pad", "resize", "anyres"),
    )
    max_tiles: int = setting(6, "anyres: choose among all grids of at most this many tiles, the single tile included")
    image_newline: bool = setting(False, "append a learned newline token to every row of patches")
    image_token_budget: int | None = setting(
        None,
        "anyres: patches that several images of a sample share evenly (default: one tile for each of them)",
    )

    @property
    def cells_per_side(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def cells_per_tile(self) -> int:
        """Patches in one tile, which is also the length of the position embedding."""
        return self.cells_per_side**2
