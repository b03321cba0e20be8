"""Frames of videos, against an independent decoding of every frame, and everything that can be wrong with a file."""

from __future__ import annotations

import io
import struct
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_haplovl.data.preprocessing import video
from megatron_haplovl.data.preprocessing.video import EncodedFrame, FrameSettings, choose, encoded_frames, spread

av = pytest.importorskip("av")

CODECS = {
    "mp4": ("libx264", {"g": "12", "bf": "2"}, {}),
    "faststart.mp4": ("libx264", {"g": "12"}, {"movflags": "faststart"}),
    "mpeg4.mp4": ("mpeg4", {"g": "12", "bf": "2"}, {}),
    "avi": ("mpeg4", {"g": "12"}, {}),
    "webm": ("libvpx-vp9", {"g": "12"}, {}),
    "mkv": ("libx264", {"g": "12"}, {}),
    "ffv1.mkv": ("ffv1", {}, {}),
    "ts": ("libx264", {"g": "12"}, {}),
    "gif": ("gif", {}, {}),
}
MANY_PIXELS = 10**7


def make_video(
    path: Path, frames: int = 40, times: list[int] | None = None, height: int = 48, width: int = 64, kind: str = ""
) -> Path:
    """A column that walks over a background that becomes lighter, ten frames a second."""
    kind = kind or path.name.partition(".")[2]
    codec, options, container_options = CODECS[kind]
    with av.open(str(path), "w", container_options=container_options) as container:
        stream: Any = container.add_stream(codec, rate=10, options=options)
        stream.width, stream.height = width, height
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        for number in range(frames):
            pixels = np.full((height, width, 3), number * 5 % 256, dtype=np.uint8)
            pixels[:, number * 3 % width] = 255
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number if times is None else times[number], Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def all_frames(path: Path) -> list[tuple[int, Image.Image]]:
    with av.open(str(path)) as container:
        return [(frame.pts, frame.to_image()) for frame in container.decode(container.streams.video[0])]


def as_jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def frames_of(source: Path | bytes, number: int = 8, size: int | None = None) -> list[EncodedFrame]:
    return list(encoded_frames(source, FrameSettings(number, size), MANY_PIXELS))


@pytest.mark.parametrize("kind", CODECS)
def test_frames_are_those_of_a_whole_decoding(tmp_path: Path, kind: str) -> None:
    path = make_video(tmp_path / f"a.{kind}")
    decoded = all_frames(path)
    assert len(decoded) == 40
    for number in (1, 2, 5, 8, 39, 40, 100):
        expected = [as_jpeg(decoded[i][1]) for i in reference(list(range(40)), number)]
        for source in (path, path.read_bytes()):
            assert [frame.data for frame in frames_of(source, number)] == expected, number


def reference(times: list[int], number: int) -> list[int]:
    """The rule, written down with fractions and a search from the front."""
    if len(times) <= number:
        return list(range(len(times)))
    moments = [times[0] + Fraction((times[-1] - times[0]) * i, max(number - 1, 1)) for i in range(number)]
    shown = [max(i for i, time in enumerate(times) if time <= moment) for moment in moments]
    return sorted(set(shown))


def test_the_rule() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        times = sorted(set(rng.integers(-500, 500, size=rng.integers(1, 60)).tolist()))
        number = int(rng.integers(1, 40))
        assert choose(times, number) == reference(times, number)
    assert spread(10, 4) == [0, 3, 6, 9] and spread(3, 8) == [0, 1, 2] and spread(9, 1) == [0]
    for count in range(9, 200):  # as LLaVA-Video takes them
        assert spread(count, 8) == np.linspace(0, count - 1, 8, dtype=int).tolist()


@pytest.mark.parametrize("kind", ["mp4", "mkv", "webm"])
def test_a_changing_frame_rate_is_even_in_time(tmp_path: Path, kind: str) -> None:
    times = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 20, 40, 60, 80, 100]
    path = make_video(tmp_path / f"a.{kind}", len(times), times)
    decoded = all_frames(path)
    expected = [0, 9, 10, 11, 12, 13, 14]  # shown at 0, 10, 20, 40, 60, 80, 100 tenths of a second
    assert reference(times, 6) == [0, 10, 11, 12, 13, 14]
    assert [f.data for f in frames_of(path, 6)] == [as_jpeg(decoded[i][1]) for i in (0, 10, 11, 12, 13, 14)]
    assert [f.data for f in frames_of(path, 11)] == [as_jpeg(decoded[i][1]) for i in expected]


def test_long_videos_are_entered_at_key_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_video(tmp_path / "a.mp4", 600)
    spent: list[int] = []
    original = video._Budget.spend

    def spend(self: Any, frame: Any) -> None:
        spent.append(1)
        original(self, frame)

    monkeypatch.setattr(video._Budget, "spend", spend)
    frames = frames_of(path, 5)
    assert len(frames) == 5 and len(spent) < 80


def test_frames_without_usable_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_video(tmp_path / "a.mp4")
    expected = frames_of(path)
    monkeypatch.setattr(video, "_read_index", lambda *_: None)
    assert frames_of(path) == expected


@pytest.mark.parametrize(("turned", "degrees"), [((0, 1, -1, 0), -90), ((-1, 0, 0, -1), 180), ((0, -1, 1, 0), 90)])
def test_frames_are_turned_as_the_file_says(tmp_path: Path, turned: tuple[int, ...], degrees: int) -> None:
    path = make_video(tmp_path / "a.mp4")
    plain = [frame for _, frame in all_frames(path)]
    matrix = struct.pack(">9i", *(1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30))
    a, b, c, d = (value << 16 for value in turned)
    data = path.read_bytes()
    header = data.index(b"tkhd")
    place = data.index(matrix, header)
    path.write_bytes(data[:place] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[place + 36 :])
    pixels = [np.rot90(np.asarray(plain[i]), degrees // 90) for i in reference(list(range(40)), 8)]
    found = frames_of(path)
    assert [(frame.height, frame.width) for frame in found] == [each.shape[:2] for each in pixels]
    assert [frame.data for frame in found] == [as_jpeg(Image.fromarray(each)) for each in pixels]


def test_large_frames_are_scaled_down_if_asked(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", height=96, width=160)
    assert {(f.height, f.width) for f in frames_of(path)} == {(96, 160)}
    assert {(f.height, f.width) for f in frames_of(path, size=32)} == {(32, 53)}
    assert {(f.height, f.width) for f in frames_of(path, size=96)} == {(96, 160)}


def make_audio(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), dtype=np.int16), format="s16", layout="mono")
        frame.sample_rate = 16000
        resampler = av.AudioResampler(format=stream.format, layout="mono", rate=16000)
        for each in resampler.resample(frame):
            container.mux(stream.encode(each))
        container.mux(stream.encode())
    return path


def damaged(folder: Path, what: str) -> bytes:
    whole = make_video(folder / f"a.{what.split()[0]}").read_bytes()
    if what.endswith("cut"):
        return whole[: len(whole) * 6 // 10]
    middle = len(whole) // 2
    assert what.endswith("zeroed")
    return whole[: middle - 400] + bytes(800) + whole[middle + 400 :]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("mp4 cut", "its index cannot be read"),
        ("mpeg4.mp4 cut", "its index cannot be read"),
        ("faststart.mp4 cut", "ends in the middle of frame"),
        ("avi cut", "ends in the middle of frame"),
        ("webm cut", "header states 4.0 s, and the file ends after"),
        ("mkv cut", "header states 4.0 s, and the file ends after"),
        ("faststart.mp4 zeroed", "frame"),
    ],
)
def test_truncated_or_damaged(tmp_path: Path, what: str, message: str) -> None:
    data = damaged(tmp_path, what)
    with pytest.raises(video.TruncatedVideoError, match=message):
        frames_of(data, 40)


def test_no_video_at_all(tmp_path: Path) -> None:
    for data, message in (
        (b"", "the file is empty"),
        (b"no video, but a text" * 50, "not a readable video"),
        (make_audio(tmp_path / "a.mp4").read_bytes(), "no moving picture, only audio"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n", "not a readable video"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "not a readable video"),
    ):
        with pytest.raises(video.VideoError, match=message):
            frames_of(data)


def test_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_video(tmp_path / "a.mp4")
    with pytest.raises(video.VideoBombError, match="frames of 48 x 64 pixels are more than the limit of 3000"):
        list(encoded_frames(path, FrameSettings(), 3000))
    monkeypatch.setattr(video, "_MAX_DECODED_PIXELS", 5 * 48 * 64)
    with pytest.raises(video.VideoBombError, match="would have to be decoded"):
        frames_of(path)


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_video(tmp_path / "a.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"pip install 'megatron-haplovl\[video\]'"):
        frames_of(path)
