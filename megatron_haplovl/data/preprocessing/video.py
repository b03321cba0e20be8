"""Videos become frames: some moments, evenly spread, each an encoded picture. PyAV decodes them, and only here.

The moments lie evenly between the first frame and the last one, both included, in the ticks of the file's own clock:
`t_i = t_0 + floor((t_last - t_0) * i / (N - 1))`. What is taken is the frame that is shown then. With a constant frame
rate these are the frames `floor((n - 1) * i / (N - 1))` of n, as LLaVA-Video takes them; with a changing one they are
even in time. A video of N frames or fewer gives all of them, and no frame is taken twice.

Frames are stored as JPEG of quality 95 without chroma subsampling: what that loses is far below what the video's own
compression and the scaling to one tile lose, and PNG would be several times as large and slower to read. The encoder is
Pillow's, so the bytes are the same in every process of one installation.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

DEFAULT_NUM_FRAMES = 8

# Containers that hold one film and name no other file or address, as playlists do.
_CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,gif"
_QUALITY = 95
_MAX_DECODED_PIXELS = 1 << 41  # ten hours of 1,920 x 1,080 at 30 frames a second
# A file that ends so much before the time in its header has lost its end.
_MISSING_SHARE, _MISSING_SECONDS = 0.02, 0.1


class VideoError(ValueError):
    """A video that cannot be used; the message says why."""


class TruncatedVideoError(VideoError):
    """The file begins as a video, and its frames are incomplete or damaged."""


class VideoBombError(VideoError):
    """More pixels than allowed, in one frame or in all that must be decoded."""


class _InexactError(Exception):
    """Jumping in the file does not lead to the frames that its index promises."""


@dataclass(frozen=True)
class FrameSettings:
    """Which frames are taken of a video."""

    num_frames: int = DEFAULT_NUM_FRAMES
    size: int | None = None
    """Frames of video files whose shorter side is longer are scaled down to it; None keeps them as they are."""


@dataclass(frozen=True)
class EncodedFrame:
    """A frame as a JPEG file."""

    data: bytes
    height: int
    width: int


def choose(times: Sequence[int], number: int) -> list[int]:
    """Indices of `number` of the sorted times, or fewer, by the rule at this file's head."""
    if len(times) <= number:
        return list(range(len(times)))
    if number == 1:
        return [0]
    first, length = times[0], times[-1] - times[0]
    moments = (first + length * i // (number - 1) for i in range(number))
    return list(dict.fromkeys(bisect_right(times, moment) - 1 for moment in moments))


def spread(count: int, number: int) -> list[int]:
    """Indices of `number` of `count` frames that have no times, by the same rule."""
    return choose(range(count), number)


def encoded_frames(source: Path | bytes, settings: FrameSettings, max_pixels: int) -> Iterator[EncodedFrame]:
    """The frames that stand for a video, in order, each turned as the file says it is shown.

    Args:
        source: the file, or its bytes.
        settings: how many frames, and how large.
        max_pixels: of one frame.

    Raises:
        VideoError: it cannot be decoded.
        ValueError: PyAV is not installed.
    """
    for image in _images(source, settings.num_frames, max_pixels):
        shorter = min(image.size)
        if settings.size is not None and shorter > settings.size:
            size = [max(1, round(side * settings.size / shorter)) for side in image.size]
            image = image.resize((size[0], size[1]), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=_QUALITY, subsampling=0)
        yield EncodedFrame(file.getvalue(), image.height, image.width)


def _images(source: Path | bytes, number: int, max_pixels: int) -> list[Image.Image]:
    try:
        with _open(source) as (container, stream):
            index = _read_index(container, stream)
            if index is None:
                raise _InexactError
            wanted = [sorted(index.times)[i] for i in choose(sorted(index.times), number)]
            return _decode_wanted(container, stream, index, wanted, max_pixels)
    except _InexactError:
        # Frames without times of their own, or whose times are not those in the index: every frame is decoded, twice.
        with _open(source) as (container, stream):
            times = [time for time, _ in _decode_all(container, stream, max_pixels)]
        wanted_indices = set(choose(times, number))
        with _open(source) as (container, stream):
            frames = enumerate(_decode_all(container, stream, max_pixels))
            return [_image(frame) for i, (_, frame) in frames if i in wanted_indices]


@contextmanager
def _open(source: Path | bytes) -> Iterator[tuple[InputContainer, VideoStream]]:
    try:
        import av
    except ImportError as error:
        raise ValueError(
            "videos are decoded by PyAV, which is not installed: pip install 'megatron-haplovl[video]'"
        ) from error
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if size == 0:
        raise VideoError("the file is empty")
    # Without protocols, a file cannot make the library open another file or an address.
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
    file: Any = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    try:
        container = av.open(file, "r", options=options, metadata_errors="ignore")
    except (av.FFmpegError, OSError, ValueError) as error:
        if _head(source)[4:] == b"ftyp":
            raise TruncatedVideoError(
                "the file begins as MP4 and its index cannot be read; its end is missing"
            ) from error
        raise VideoError(f"not a readable video ({size} bytes): {_said(error)}") from error
    with container:
        covers = av.stream.Disposition.attached_pic
        streams = [stream for stream in container.streams.video if not stream.disposition & covers]
        if not streams:
            kinds = sorted({stream.type for stream in container.streams})
            raise VideoError(f"the file has no moving picture, only {', '.join(kinds) or 'nothing'}")
        stream = streams[0]
        stream.codec_context.thread_count = 1  # the workers are the parallelism
        try:
            yield container, stream
        except (av.FFmpegError, OSError) as error:
            raise TruncatedVideoError(
                f"a {stream.codec_context.name} frame cannot be decoded: {_said(error)}"
            ) from error


def _head(source: Path | bytes) -> bytes:
    if isinstance(source, bytes):
        return source[:8]
    with source.open("rb") as file:
        return file.read(8)


def _said(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


@dataclass(frozen=True)
class _Index:
    """The frames of a file in the order in which they are stored."""

    times: list[int]
    starts: list[int]
    """For each frame, the time of the frame from which decoding must begin to show it."""


def _read_index(container: InputContainer, stream: VideoStream) -> _Index | None:
    """Read the whole file without decoding; None if frames have no times of their own."""
    times: list[int | None] = []
    is_start: list[bool] = []
    end = 0.0
    for packet in container.demux():
        if packet.size == 0 or packet.time_base is None:
            continue
        if packet.is_corrupt:
            raise TruncatedVideoError(f"the file ends in the middle of frame {len(times)}, or is damaged there")
        if packet.pts is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index == stream.index and not packet.is_discard:
            times.append(packet.pts)
            is_start.append(packet.is_keyframe)
    # Only Matroska's header states the time and is written before the frames; the others' is measured.
    if container.format.name.startswith("matroska") and container.duration is not None:
        stated = container.duration / 1e6
        if stated - end > _MISSING_SECONDS + _MISSING_SHARE * stated:
            raise TruncatedVideoError(f"the header states {stated:.1f} s, and the file ends after {end:.1f} s")
    if not times:
        raise VideoError("the file has no frames")
    known = [time for time in times if time is not None]
    if len(known) < len(times) or len(set(known)) < len(known) or not is_start[0]:
        return None
    # A frame that is stored behind a key frame and shown before it needs the key frame before that.
    starts: list[int] = []
    key_times = list(accumulate((time if key else None for time, key in zip(known, is_start, strict=True)), _latest))
    previous: dict[int, int] = {}
    for time, key in zip(known, key_times, strict=True):
        assert key is not None
        starts.append(key if key <= time else previous.get(key, known[0]))
        previous.setdefault(key, starts[-1])
    return _Index(known, starts)


def _latest(before: int | None, now: int | None) -> int | None:
    return before if now is None else now


def _decode_wanted(
    container: InputContainer, stream: VideoStream, index: _Index, wanted: list[int], max_pixels: int
) -> list[Image.Image]:
    """The frames of some times, in order; the file is entered at the key frame before each."""
    starts = dict(zip(index.times, index.starts, strict=True))
    images: list[Image.Image] = []
    budget = _Budget(stream, max_pixels)
    frames: Iterator[VideoFrame] = iter(())
    position: int | None = None
    for time in wanted:
        if position is None or starts[time] > position:
            container.seek(starts[time], stream=stream)
            frames, position = iter(container.decode(stream)), None
        for frame in frames:
            budget.spend(frame)
            if frame.pts is None or (position is None and frame.pts > time):
                raise _InexactError
            position = frame.pts
            if position >= time:
                break
        if position != time:
            raise _InexactError
        images.append(_image(frame))
    return images


def _decode_all(container: InputContainer, stream: VideoStream, max_pixels: int) -> Iterator[tuple[int, VideoFrame]]:
    """Every frame with its time; with its number if there is a frame without one."""
    budget = _Budget(stream, max_pixels)
    last = -1
    for frame in container.decode(stream):
        budget.spend(frame)
        last = max(last + 1, frame.pts or 0)
        yield last, frame
    if last < 0:
        raise VideoError("the file has no frames")


class _Budget:
    """What may be decoded of one video."""

    def __init__(self, stream: VideoStream, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._left = _MAX_DECODED_PIXELS
        self._check(stream.codec_context.height, stream.codec_context.width)

    def spend(self, frame: VideoFrame) -> None:
        """Count a frame.

        Raises:
            VideoBombError: it is too large, or too much has been decoded.
        """
        self._check(frame.height, frame.width)
        self._left -= frame.height * frame.width
        if self._left < 0:
            raise VideoBombError(f"more than {_MAX_DECODED_PIXELS} pixels would have to be decoded")

    def _check(self, height: int, width: int) -> None:
        if height * width > self._max_pixels:
            raise VideoBombError(f"frames of {height} x {width} pixels are more than the limit of {self._max_pixels}")


def _image(frame: VideoFrame) -> Image.Image:
    if frame.is_corrupt:
        raise TruncatedVideoError("a frame is damaged")
    if frame.rotation % 90:
        raise VideoError(f"it is to be shown turned by {frame.rotation} degrees; only multiples of 90 are known")
    # Turning by a multiple of 90 degrees moves pixels and changes none.
    return frame.to_image().rotate(frame.rotation, expand=True)
