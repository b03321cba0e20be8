"""Where the paths of images and videos begin, and where they may lead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_haplovl.data.layouts.media import IMAGE_SUFFIXES
from megatron_haplovl.data.natural_order import natural_key
from megatron_haplovl.data.records import Reason, RecordError, resolve_image


@dataclass(frozen=True)
class ImageFolders:
    """Folders that are searched in their order, and folders into which links may lead. Made by :func:`open_folders`."""

    folders: tuple[Path, ...]
    roots: tuple[Path, ...] = ()

    def find(self, relative: str, *, may_be_folder: bool = False) -> Path:
        """The file of a path, or the folder of frames where that may be one.

        Raises:
            RecordError: the path is not below an image folder, leads out of it, or is not there.
        """
        if not self.folders:
            raise RecordError(Reason.MISSING_IMAGE, f"{relative[:100]!r}: there is no --image-folder")
        for number, folder in enumerate(self.folders, start=1):
            try:
                return resolve_image(relative, folder, (*self.folders, *self.roots), may_be_folder=may_be_folder)
            except RecordError as error:
                if error.reason is not Reason.MISSING_IMAGE or number == len(self.folders):
                    raise
        raise AssertionError("the last folder returns or raises")


def open_folders(folders: Sequence[str | Path], roots: Sequence[str | Path] = ()) -> ImageFolders:
    """The folders of `--image-folder` and `--image-root`.

    Raises:
        ValueError: one does not exist.
    """
    for what, paths in (("image folder", folders), ("image root", roots)):
        for path in paths:
            if not Path(path).is_dir():
                raise ValueError(f"the {what} {path} does not exist")
    return ImageFolders(tuple(Path(p).resolve() for p in folders), tuple(Path(p).resolve() for p in roots))


def frames_of(folder: Path) -> tuple[Path, ...]:
    """The images of a folder of frames, in natural order.

    Raises:
        RecordError: there are none.
    """
    frames = sorted(
        (p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")),
        key=natural_key,
    )
    if not frames:
        raise RecordError(Reason.MISSING_IMAGE, f"the folder of frames {str(folder)[-100:]!r} holds no images")
    return tuple(frames)
