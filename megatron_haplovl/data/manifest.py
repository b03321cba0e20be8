"""PREFIX.manifest.json: what a set of preprocessed files holds, and how it was made.

It depends on the input alone (no dates, no paths), so that the same records always give the same manifest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMAT_VERSION = 2
"""Rises when a file is added or means something else."""
OLDEST_VERSION = 1
"""The oldest version that can be read: without videos, and without the files in `ADDED_IN_2`."""

TOKENS = ""
LOSS_MASK = "_loss_mask"
IMAGES = "_images"
IMAGE_REFS = "_image_refs"
IMAGE_SIZES = "_image_sizes.npy"
IMAGE_DIGESTS = "_image_digests.npy"
SAMPLE_LM_TOKENS = "_sample_lm_tokens.npy"
SAMPLE_HASHES = "_sample_hashes.npy"
ADDED_IN_2 = (IMAGE_DIGESTS, SAMPLE_LM_TOKENS, SAMPLE_HASHES)
DATA_SUFFIXES = (
    *(f"{part}.{kind}" for part in (TOKENS, LOSS_MASK, IMAGES, IMAGE_REFS) for kind in ("bin", "idx")),
    IMAGE_SIZES,
    *ADDED_IN_2,
)
"""Every data file of a prefix, as the end of its name."""
MANIFEST_SUFFIX = ".manifest.json"
REPORT_SUFFIX = ".report.jsonl"


@dataclass(frozen=True)
class FileEntry:
    """One data file."""

    bytes: int
    sha256: str
    """Of the file; of `_images.bin`, from format 2 on, of the images' digests, one behind the other."""


@dataclass(frozen=True)
class Counts:
    """What the files hold."""

    samples: int
    text_only_samples: int
    tokens: int
    """Token ids, an image counted as one (the number of its visual tokens depends on the model)."""
    loss_tokens: int
    """Tokens that are trained in stage 2."""
    image_references: int
    images: int
    """Distinct images."""
    image_bytes: int
    longest_sample: int
    """Token ids of the longest sample, an image counted as one."""
    largest_token_id: int
    """Placeholders for images are not counted."""
    videos: int = 0
    """Uses of videos; their frames are image references, too."""


@dataclass(frozen=True)
class Origin:
    """What made the samples; it must be the same in files that are joined. The fields are the manifest's."""

    tokenizer_fingerprint: str
    image_token_id: int
    video_token_id: int
    chat_template: str
    chat_template_sha256: str


@dataclass(frozen=True)
class Manifest:
    """Contents of PREFIX.manifest.json."""

    format_version: int
    tokenizer_fingerprint: str
    image_token_id: int
    video_token_id: int
    chat_template: str
    chat_template_sha256: str
    counts: Counts
    skipped: dict[str, int]
    """Records that were left out, by reason."""
    files: dict[str, FileEntry]
    """Data files by suffix."""
    repairs: dict[str, int] = field(default_factory=dict)
    """Records that were repaired, by the name of the repair."""
    unread_keys: dict[str, int] = field(default_factory=dict)
    """Records in which there was a key that nothing reads, by the key."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Samples with an image of which something is not used, by what that is."""
    num_frames: int | None = None
    """Frames that were taken of a video file; None without videos."""

    @property
    def origin(self) -> Origin:
        """What made the samples."""
        return Origin(*(getattr(self, field.name) for field in dataclasses.fields(Origin)))

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The data files of this format version, as the end of their names."""
        missing = ADDED_IN_2 if self.format_version < 2 else ()
        return tuple(suffix for suffix in DATA_SUFFIXES if suffix not in missing)

    @property
    def content_hash(self) -> str:
        """Hash of everything above: two prefixes with the same hash hold the same data."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """The text of the file. It ends with the content hash, so that damage is seen when it is read."""
        return json.dumps(dataclasses.asdict(self) | {_CONTENT_HASH: self.content_hash}, indent=2) + "\n"

    def write(self, path: Path) -> None:
        """Write the JSON."""
        path.write_text(self.to_json(), encoding="utf-8")


_CONTENT_HASH = "content_hash"


def load_manifest(prefix: str) -> Manifest:
    """Read PREFIX.manifest.json, without a look at the data files.

    Raises:
        ValueError: the manifest is missing, damaged or of another version.
    """
    path = Path(prefix + MANIFEST_SUFFIX)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; {prefix!r} is not the prefix of preprocessed data")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        stated = fields.pop(_CONTENT_HASH, None)
        manifest = _from_json(fields)
        check_kinds(manifest)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a manifest: {type(error).__name__}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not a manifest: {error}") from error
    if not OLDEST_VERSION <= manifest.format_version <= FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {manifest.format_version}, this program reads versions {OLDEST_VERSION} to "
            f"{FORMAT_VERSION}; preprocess again"
        )
    # Manifests of format 1 state no hash.
    if stated is not None and stated != manifest.content_hash:
        raise ValueError(f"{path} is damaged: it does not have the content hash that it states, {stated}")
    return manifest


def read_manifest(prefix: str) -> Manifest:
    """Read PREFIX.manifest.json and check that the data files exist with the sizes it states.

    Raises:
        ValueError: the manifest is missing, damaged or of another version, or a file is missing or has another size.
    """
    path, manifest = Path(prefix + MANIFEST_SUFFIX), load_manifest(prefix)
    for suffix in manifest.suffixes:
        file = Path(prefix + suffix)
        if suffix not in manifest.files:
            raise ValueError(f"{path} does not list {file.name}")
        if not file.is_file():
            raise ValueError(f"{file} is missing, but {path.name} lists it")
        expected, size = manifest.files[suffix].bytes, file.stat().st_size
        if size != expected:
            problem = "truncated" if size < expected else "not the file that was written"
            raise ValueError(f"{file} is {problem}: it has {size} bytes, {path.name} says {expected}")
    return manifest


_LARGEST = 1 << 62


def check_kinds(manifest: Manifest) -> None:
    """Look at the kind of every value, which JSON leaves open.

    Raises:
        ValueError: one is of another kind, or no number that a file can have.
    """
    counts = {f"counts.{name}": value for name, value in vars(manifest.counts).items()}
    sizes = {f"files.{suffix}.bytes": entry.bytes for suffix, entry in manifest.files.items()}
    whole = {name: getattr(manifest, name) for name in ("format_version", "image_token_id", "video_token_id")}
    if manifest.num_frames is not None:
        whole["num_frames"] = manifest.num_frames
    for name, value in (whole | counts | sizes).items():
        # True and False are numbers to Python. Earlier versions counted a single sample without images as true.
        if type(value) is not int and not (name == "counts.text_only_samples" and value is True):
            raise ValueError(f"{name} is {value!r} and no whole number")
        if not 0 <= value <= _LARGEST:
            raise ValueError(f"{name} is {value}")
    texts = {name: getattr(manifest, name) for name in ("tokenizer_fingerprint", "chat_template")}
    texts |= {"chat_template_sha256": manifest.chat_template_sha256}
    texts |= {f"files.{suffix}.sha256": entry.sha256 for suffix, entry in manifest.files.items()}
    for name, value in texts.items():
        if not isinstance(value, str):
            raise ValueError(f"{name} is {value!r} and no text")
    for name in ("skipped", "repairs", "unread_keys", "left_out"):
        if not isinstance(getattr(manifest, name), dict):
            raise ValueError(f"{name} is {getattr(manifest, name)!r} and no object")


def _from_json(value: dict[str, Any]) -> Manifest:
    fields = dict(value)
    fields["counts"] = Counts(**fields["counts"])
    fields["files"] = {suffix: FileEntry(**entry) for suffix, entry in fields["files"].items()}
    return Manifest(**fields)
