"""Images and video frames to normalised tiles, by the same code that feeds training."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data.image_geometry import grid_pinpoints, vision_of_frames, vision_of_sample
from megatron_haplovl.data.image_processing import CLIP_MEAN, CLIP_STD, image_to_tiles
from megatron_haplovl.hf.image_inputs_haplo import as_picture


class HaploImageProcessor(BaseImageProcessor):
    """Cuts images into tiles and normalises them.

    Args:
        size: `{"height": ..., "width": ...}` of one tile in pixels; square.
        patch_size: side of a patch in pixels.
        image_aspect_ratio: `pad` or `resize` (one tile per image), or `anyres_max_N` (up to N tiles).
        image_grid_pinpoints: for any resolution, the [height, width] in pixels that a grid of tiles may have. The
            default, every grid of one to N tiles, is also the only supported list.
        image_newline: whether each row of patches ends with a newline token.
        image_token_budget: for any resolution, patches that several images of a text share evenly; None gives each of
            them one tile.
        image_mean: mean per channel; CLIP's.
        image_std: standard deviation per channel; CLIP's.
        rescale_factor: 1/255.
        resample: Pillow's number of the bicubic filter.

    Raises:
        ValueError: a value that the model was not trained with.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        size: dict[str, int] | None = None,
        patch_size: int = 14,
        image_aspect_ratio: str = "anyres_max_6",
        image_grid_pinpoints: Sequence[Sequence[int]] | None = None,
        image_newline: bool = True,
        image_token_budget: int | None = None,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        rescale_factor: float = 1 / 255,
        resample: int = int(Image.Resampling.BICUBIC),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.size = {"height": 336, "width": 336} if size is None else dict(size)
        self.patch_size = patch_size
        self.image_aspect_ratio = image_aspect_ratio
        self.image_newline = image_newline
        self.image_token_budget = image_token_budget
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.rescale_factor = rescale_factor
        self.resample = int(resample)
        if self.size.get("height") != self.size.get("width"):
            raise ValueError(f"size {self.size} is not a square tile")
        fixed = (
            ("image_mean", self.image_mean, CLIP_MEAN),
            ("image_std", self.image_std, CLIP_STD),
            ("rescale_factor", [rescale_factor], [1 / 255]),
            ("resample", [self.resample], [int(Image.Resampling.BICUBIC)]),
        )
        for name, found, expected in fixed:
            if not np.allclose(found, expected):
                raise ValueError(f"{name} {found} is not what HaploVL is trained with, {list(expected)}")
        self.image_grid_pinpoints = self._check_pinpoints(image_grid_pinpoints)

    @property
    def vision(self) -> VisionConfig:
        """The same settings in the form of the training configuration."""
        mode, _, max_tiles = self.image_aspect_ratio.partition("_max_")
        tile = VisionConfig(
            patch_size=self.patch_size,
            image_size=self.size["height"],
            image_newline=self.image_newline,
            image_token_budget=self.image_token_budget,
        )
        if mode in ("pad", "resize") and not max_tiles:
            return dataclasses.replace(tile, image_aspect_ratio=mode)
        if mode == "anyres" and re.fullmatch("[1-9][0-9]*", max_tiles):
            return dataclasses.replace(tile, image_aspect_ratio=mode, max_tiles=int(max_tiles))
        raise ValueError(f"image_aspect_ratio {self.image_aspect_ratio!r} is not 'pad', 'resize' or 'anyres_max_N'")

    def _check_pinpoints(self, given: Sequence[Sequence[int]] | None) -> list[list[int]] | None:
        if self.vision.image_aspect_ratio != "anyres":
            return None
        expected = [list(pinpoint) for pinpoint in grid_pinpoints(self.vision)]
        if given is not None and sorted(map(list, given)) != sorted(expected):
            raise ValueError(
                f"image_grid_pinpoints {[list(pinpoint) for pinpoint in given]} are not all grids that "
                f"{self.image_aspect_ratio} names: {expected}"
            )
        return expected

    def preprocess(
        self,
        images: Any,
        return_tensors: str | None = None,
        *,
        visuals_in_sample: int = 1,
        **kwargs: Any,
    ) -> BatchFeature:
        """Cut images into tiles.

        Args:
            images: one image or several, each looked at by itself: pictures of Pillow's, uint8 arrays, paths,
                addresses (`image_inputs_haplo.as_picture`).
            visuals_in_sample: images and videos of the text that each of them belongs to. Several of them have fewer
                tiles each than one alone.
            return_tensors: "pt", "np" or None.

        Returns:
            `pixel_values` [T, 3, height, width], the tiles of all images one after the other, and `image_sizes` [N, 2],
            the (height, width) of the upright originals.

        Raises:
            ValueError: an argument that this class does not know, or something that is not an image.
        """
        images = self._as_images(images, kwargs)
        vision = vision_of_sample(visuals_in_sample, self.vision)
        tiles = [image_to_tiles(image, vision) for image in images]
        return self._features(tiles, [(image.height, image.width) for image in images], return_tensors)

    def preprocess_frames(self, frames: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """Resize the frames of a video to one tile each; same result as :meth:`preprocess`."""
        frames = self._as_images(frames, kwargs)
        tiles = [image_to_tiles(frame, vision_of_frames(self.vision)) for frame in frames]
        return self._features(tiles, [(frame.height, frame.width) for frame in frames], return_tensors)

    def _features(self, tiles: list[Any], sizes: list[tuple[int, int]], return_tensors: str | None) -> BatchFeature:
        data = {"pixel_values": np.concatenate(tiles), "image_sizes": np.array(sizes, dtype=np.int64)}
        return BatchFeature(data=data, tensor_type=return_tensors)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Pictures of paths, addresses or anything else that :meth:`preprocess` takes, nested as they are given."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(one) for one in image_url_or_urls]
        return as_picture(image_url_or_urls)

    @staticmethod
    def _as_images(images: Any, unknown: dict[str, Any]) -> list[Image.Image]:
        if unknown:
            raise ValueError(f"unknown arguments: {', '.join(sorted(unknown))}")
        one = isinstance(images, (Image.Image, str)) or (isinstance(images, np.ndarray) and images.ndim < 4)
        images = [images] if one else list(images)
        if not images:
            raise ValueError("no images given")
        return [as_picture(image) for image in images]
