"""Images and videos of records: found, decoded to the end once, measured, and named by their digest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from megatron_haplovl.data import image_processing
from megatron_haplovl.data.image_geometry import Frames, Picture
from megatron_haplovl.data.image_processing import InspectedImage
from megatron_haplovl.data.preprocessing import video
from megatron_haplovl.data.preprocessing.image_folders import ImageFolders, frames_of
from megatron_haplovl.data.preprocessing.video import FrameSettings, spread
from megatron_haplovl.data.records import Image, Reason, RecordError, Video

K = TypeVar("K")
V = TypeVar("V")

_IMAGES_KEPT = 1 << 17  # sizes and digests that are remembered, some hundred bytes each
_VIDEO_BYTES_KEPT = 64 << 20  # bytes of videos' frames that are remembered


@dataclass(frozen=True)
class FoundImage:
    """An image, or a frame, that has been decoded once, to its end."""

    digest: bytes
    """SHA-256 of the encoded bytes."""
    height: int
    width: int
    path: Path | None = None
    """Its file, if it has one."""
    left_out: tuple[str, ...] = ()
    """What of it is not used (`image_modes.left_out`)."""
    data: bytes | None = None
    """The encoded bytes; None if they were seen before, and are in the file still."""

    @property
    def shape(self) -> Picture:
        """What its layout depends on."""
        return Picture(self.height, self.width)

    @property
    def images(self) -> tuple[FoundImage, ...]:
        """Itself, as the frames of a video are its images."""
        return (self,)

    def read(self) -> bytes:
        """The encoded bytes.

        Raises:
            ValueError: the file was changed since it was looked at.
            OSError: the file cannot be read any more.
        """
        if self.data is not None:
            return self.data
        assert self.path is not None
        data = self.path.read_bytes()
        if hashlib.sha256(data).digest() != self.digest:
            raise ValueError(f"{self.path} was changed while it was being preprocessed")
        return data


@dataclass(frozen=True)
class FoundVideo:
    """The frames that stand for a video."""

    frames: tuple[FoundImage, ...]

    @property
    def shape(self) -> Frames:
        """What its layout depends on."""
        return Frames(len(self.frames))

    @property
    def images(self) -> tuple[FoundImage, ...]:
        """The frames."""
        return self.frames


class MediaFinder:
    """Looks at the media of records. A file is decoded and hashed once, however often it is used.

    Args:
        folders: where paths begin.
        max_pixels: larger images and frames are refused.
        frames: which frames are taken of a video.
    """

    def __init__(self, folders: ImageFolders, max_pixels: int, frames: FrameSettings) -> None:
        self._folders = folders
        self._max_pixels = max_pixels
        self._frame_settings = frames
        # The state of a file is part of its key, so that a file that changes is looked at again.
        self._files: dict[tuple[str, int, int], FoundImage] = {}
        self._inspected: dict[bytes, InspectedImage] = {}
        self._videos: dict[tuple[str, int, int], FoundVideo] = {}
        self._video_bytes = 0

    def find(self, medium: Image | Video) -> FoundImage | FoundVideo:
        """Look at one medium.

        Raises:
            RecordError: it is missing, damaged, too large, or outside the image folder.
        """
        return self._image(medium) if isinstance(medium, Image) else self._video(medium)

    def _image(self, image: Image) -> FoundImage:
        if image.data is not None:
            return self._look(image.data, "the image in the record", None)
        assert image.path is not None
        return self._file(self._folders.find(image.path))

    def _file(self, path: Path) -> FoundImage:
        key = _state(path)
        known = self._files.get(key)
        if known is not None:
            return known
        found = self._look(_read(path), str(path), path)
        _remember(self._files, key, replace(found, data=None))
        return found

    def _look(self, data: bytes, name: str, path: Path | None) -> FoundImage:
        digest = hashlib.sha256(data).digest()
        image = self._inspected.get(digest)
        if image is None:
            image = self._inspect(data, name)
            _remember(self._inspected, digest, image)
        return FoundImage(digest, image.height, image.width, path, image.left_out, data)

    def _inspect(self, data: bytes, name: str) -> InspectedImage:
        try:
            return image_processing.inspect_image(data, self._max_pixels)
        except image_processing.DecompressionBombError as error:
            raise RecordError(Reason.DECOMPRESSION_BOMB, f"{name}: {error}") from error
        except image_processing.TruncatedImageError as error:
            raise RecordError(Reason.TRUNCATED_IMAGE, f"{name}: {error}") from error
        except image_processing.ImageError as error:
            raise RecordError(Reason.UNDECODABLE_IMAGE, f"{name}: {error}") from error

    def _video(self, medium: Video) -> FoundVideo:
        number = self._frame_settings.num_frames
        if medium.frames:
            return FoundVideo(tuple(self._image(medium.frames[i]) for i in spread(len(medium.frames), number)))
        if medium.data is not None:
            return FoundVideo(tuple(self._decode(medium.data, "the video in the record")))
        assert medium.path is not None
        path = self._folders.find(medium.path, may_be_folder=True)
        if path.is_dir():
            names = frames_of(path)
            # Each is resolved by itself, because a link may lead anywhere.
            frames = [f"{medium.path}/{names[i].name}" for i in spread(len(names), number)]
            return FoundVideo(tuple(self._file(self._folders.find(frame)) for frame in frames))
        return self._video_file(path)

    def _video_file(self, path: Path) -> FoundVideo:
        key = _state(path)
        known = self._videos.get(key)
        if known is not None:
            return known
        found = FoundVideo(tuple(self._decode(path, str(path))))
        self._videos[key] = found
        self._video_bytes += _size(found)
        while self._video_bytes > _VIDEO_BYTES_KEPT and len(self._videos) > 1:
            self._video_bytes -= _size(self._videos.pop(next(iter(self._videos))))
        return found

    def _decode(self, source: Path | bytes, name: str) -> Iterator[FoundImage]:
        try:
            for frame in video.encoded_frames(source, self._frame_settings, self._max_pixels):
                yield FoundImage(hashlib.sha256(frame.data).digest(), frame.height, frame.width, data=frame.data)
        except video.VideoBombError as error:
            raise RecordError(Reason.DECOMPRESSION_BOMB, f"{name}: {error}") from error
        except video.TruncatedVideoError as error:
            raise RecordError(Reason.TRUNCATED_VIDEO, f"{name}: {error}") from error
        except video.VideoError as error:
            raise RecordError(Reason.UNDECODABLE_VIDEO, f"{name}: {error}") from error


def _state(path: Path) -> tuple[str, int, int]:
    try:
        state = os.stat(path)
    except OSError as error:
        raise RecordError(Reason.MISSING_IMAGE, f"{path} cannot be read: {error.strerror}") from error
    return str(path), state.st_size, state.st_mtime_ns


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RecordError(Reason.MISSING_IMAGE, f"{path} cannot be read: {error.strerror}") from error


def _remember(cache: dict[K, V], key: K, value: V) -> None:
    if len(cache) >= _IMAGES_KEPT:
        del cache[next(iter(cache))]
    cache[key] = value


def _size(found: FoundVideo) -> int:
    return sum(len(frame.data) for frame in found.frames if frame.data is not None)
