"""Images and videos of records: each file decoded and hashed once, frames in order, and nothing outside the folder."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Picture

from megatron_haplovl.data import image_processing
from megatron_haplovl.data.preprocessing import media, video
from megatron_haplovl.data.preprocessing.image_folders import open_folders
from megatron_haplovl.data.preprocessing.media import FoundImage, FoundVideo, MediaFinder
from megatron_haplovl.data.preprocessing.video import EncodedFrame, FrameSettings
from megatron_haplovl.data.records import Image, RecordError, Video
from tests.conftest import write_image
from tests.unit.data.preprocessing.test_video import make_video


@pytest.fixture
def finder(tmp_path: Path) -> MediaFinder:
    return MediaFinder(open_folders([tmp_path]), 10**6, FrameSettings(4))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what was decoded."""
    calls: list[int] = []
    original = image_processing.inspect_image

    def inspect_image(data: bytes, max_pixels: int) -> image_processing.InspectedImage:
        calls.append(len(data))
        return original(data, max_pixels)

    monkeypatch.setattr(image_processing, "inspect_image", inspect_image)
    return calls


def found_image(finder: MediaFinder, image: Image) -> FoundImage:
    found = finder.find(image)
    assert isinstance(found, FoundImage)
    return found


def digests(finder: MediaFinder, video: Video) -> list[bytes]:
    found = finder.find(video)
    assert isinstance(found, FoundVideo)
    return [frame.digest for frame in found.frames]


def test_a_file_is_decoded_once(finder: MediaFinder, tmp_path: Path, decoded: list[int]) -> None:
    write_image(tmp_path / "a.png", 5, 7, seed=1)
    write_image(tmp_path / "b.png", 6, 7, seed=2)
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "copy.png").write_bytes(data)
    first = found_image(finder, Image(path="a.png"))
    assert (first.height, first.width, first.digest) == (5, 7, hashlib.sha256(data).digest())
    for image in (Image(path="a.png"), Image(path="copy.png"), Image(data=data), Image(path="a.png")):
        again = found_image(finder, image)
        assert (again.height, again.width, again.digest, again.read()) == (5, 7, first.digest, data)
    assert decoded == [len(data)]
    # A file that was replaced meanwhile is another one.
    os.replace(tmp_path / "b.png", tmp_path / "a.png")
    assert found_image(finder, Image(path="a.png")).height == 6 and len(decoded) == 2


def test_a_file_that_changes_before_it_is_written(finder: MediaFinder, tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", 5, 7, seed=1)
    finder.find(Image(path="a.png"))
    known = found_image(finder, Image(path="a.png"))
    write_image(tmp_path / "a.png", 5, 7, seed=2)
    with pytest.raises(ValueError, match="was changed while it was being preprocessed"):
        known.read()


def test_frames_of_a_folder_and_of_a_list(finder: MediaFinder, tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(1, 13)]
    for number, name in enumerate(names):
        write_image(tmp_path / "frames" / name, 4, 4, seed=number)
    (tmp_path / "frames" / "notes.txt").write_text("no frame")
    expected = [hashlib.sha256((tmp_path / "frames" / names[i]).read_bytes()).digest() for i in (0, 3, 7, 11)]
    assert digests(finder, Video(path="frames")) == expected
    assert digests(finder, Video(frames=tuple(Image(path=f"frames/{name}") for name in names))) == expected
    assert digests(finder, Video(frames=(Image(path="frames/2.png"),))) == [
        hashlib.sha256((tmp_path / "frames" / "2.png").read_bytes()).digest()
    ]


def test_a_video_is_decoded_once(finder: MediaFinder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_video(tmp_path / "a.mp4")
    calls: list[object] = []
    original = video.encoded_frames

    def encoded_frames(source: Path | bytes, *more: Any) -> Iterator[EncodedFrame]:
        calls.append(source)
        return original(source, *more)

    monkeypatch.setattr(video, "encoded_frames", encoded_frames)
    first = digests(finder, Video(path="a.mp4"))
    assert len(first) == 4 and digests(finder, Video(path="a.mp4")) == first and calls == [path]
    assert digests(finder, Video(data=path.read_bytes())) == first
    found = finder.find(Video(path="a.mp4"))
    assert isinstance(found, FoundVideo)
    for frame in found.frames:
        picture = Picture.open(io.BytesIO(frame.read()))
        assert picture.format == "JPEG" and (picture.height, picture.width) == (frame.height, frame.width) == (48, 64)
    # Their bytes are dropped when there are too many, and a video is decoded again then.
    monkeypatch.setattr(media, "_VIDEO_BYTES_KEPT", 1)
    make_video(tmp_path / "b.mp4", frames=20)
    digests(finder, Video(path="b.mp4"))
    assert digests(finder, Video(path="a.mp4")) == first and len(calls) == 4


@pytest.mark.parametrize(
    ("medium", "reason"),
    [
        (Image(path="absent.png"), "missing_image"),
        (Image(path="cut.png"), "truncated_image"),
        (Image(data=b"nothing"), "undecodable_image"),
        (Image(path="large.png"), "decompression_bomb"),
        (Image(path="../outside.png"), "path_escapes_image_folder"),
        (Image(path="folder"), "missing_image"),
        (Video(path="absent.mp4"), "missing_image"),
        (Video(path="empty"), "missing_image"),
        (Video(path="leaving"), "path_escapes_image_folder"),
        (Video(path="mixed"), "truncated_image"),
        (Video(path="cut.mp4"), "truncated_video"),
        (Video(path="text.mp4"), "undecodable_video"),
        (Video(path="none.mp4"), "undecodable_video"),
        (Video(data=b"nothing"), "undecodable_video"),
        (Video(path="large.mp4"), "decompression_bomb"),
        (Video(frames=(Image(path="a.png"), Image(path="absent.png"))), "missing_image"),
    ],
)
def test_what_cannot_be_used(tmp_path: Path, medium: Image | Video, reason: str) -> None:
    folder = tmp_path / "images"
    write_image(folder / "a.png", 4, 4, seed=0)
    write_image(folder / "large.png", 60, 60, seed=0)
    data = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "outside.png").write_bytes(data)
    for name in ("empty", "leaving", "mixed", "folder"):
        (folder / name).mkdir()
    (folder / "leaving" / "1.png").symlink_to(tmp_path / "outside.png")
    (folder / "mixed" / "1.png").write_bytes(data[: len(data) // 2])
    if str(medium.path).endswith(".mp4"):
        whole = make_video(folder / "whole.mp4", height=48, width=48).read_bytes()
        (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
        (folder / "text.mp4").write_text("no video")
        (folder / "none.mp4").write_bytes(b"")
        make_video(folder / "large.mp4", height=64, width=64)
    finder = MediaFinder(open_folders([folder]), 3000, FrameSettings(4))
    with pytest.raises(RecordError) as caught:
        finder.find(medium)
    assert caught.value.reason.value == reason
    assert np.all([word in str(caught.value) for word in (medium.path or "",) if reason != "path_escapes_image_folder"])
