"""From records to the files of a prefix. The command line around it is haplovl-preprocess."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data import image_processing
from megatron_haplovl.data import manifest as names
from megatron_haplovl.data.chat_template import ConversationEncoder, EncodedConversation, load_chat_template
from megatron_haplovl.data.image_geometry import Frames, Picture, visual_layouts
from megatron_haplovl.data.indexed_dataset import IndexedDatasetWriter
from megatron_haplovl.data.manifest import Counts, FileEntry, Manifest
from megatron_haplovl.data.records import Image, RawRecord, Reason, RecordError, Video, check_record, resolve_image
from megatron_haplovl.data.sample_hash import sample_hash
from megatron_haplovl.data.tokenizer import load_tokenizer


@dataclass(frozen=True)
class ProcessorSettings:
    """All that a worker needs to build its own :class:`RecordProcessor`."""

    tokenizer_model: str
    chat_template: str
    image_folder: str | None
    max_image_pixels: int = image_processing.DEFAULT_MAX_PIXELS
    vocab_size: int | None = None
    """If given, token ids must be below it."""
    vision: VisionConfig | None = None
    seq_length: int | None = None
    """If given (with `vision`), samples must not be longer."""


@dataclass(frozen=True)
class FoundImage:
    """An image file that has been decoded once, to the end."""

    path: str
    sha256: str
    height: int
    width: int


@dataclass(frozen=True)
class FoundVideo:
    """The frames of a video, each looked at like an image."""

    frames: tuple[FoundImage, ...]


@dataclass(frozen=True)
class ProcessedSample:
    """A record that can be used."""

    conversation: EncodedConversation
    visuals: tuple[FoundImage | FoundVideo, ...]

    @property
    def images(self) -> Iterator[FoundImage]:
        """Images and frames, in order."""
        for visual in self.visuals:
            yield from visual.frames if isinstance(visual, FoundVideo) else (visual,)


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used: one line of the report."""

    location: str
    id: str | None
    reason: str
    detail: str


class RecordProcessor:
    """Checks, tokenizes and looks at the images of one record at a time.

    Raises:
        ValueError: tokenizer and chat template cannot be loaded or do not fit each other.
    """

    def __init__(self, settings: ProcessorSettings) -> None:
        self._settings = settings
        self.tokenizer = load_tokenizer(settings.tokenizer_model)
        self.template = load_chat_template(settings.chat_template)
        self._encoder = ConversationEncoder(self.tokenizer, self.template)
        self._folder = None if settings.image_folder is None else Path(settings.image_folder).resolve()
        if self._folder is not None and not self._folder.is_dir():
            raise ValueError(f"the image folder {settings.image_folder} does not exist")
        # Data sets ask several questions about one image.
        self._inspect = lru_cache(maxsize=65536)(self._inspect_uncached)

    def process(self, raw: RawRecord) -> ProcessedSample | BadRecord:
        """Process one record; whatever is wrong with it is in the result."""
        try:
            record = check_record(raw)
            visuals = tuple(self._find(medium) for medium in record.media)
            conversation = self._encoder.encode(record)
            self._check_vocabulary(conversation.token_ids)
            self._check_length(conversation.token_ids, visuals)
        except RecordError as error:
            return BadRecord(raw.location, raw.id, error.reason.value, error.detail)
        return ProcessedSample(conversation, visuals)

    def _find(self, medium: Image | Video) -> FoundImage | FoundVideo:
        if medium.path is None or isinstance(medium, Video):
            raise RecordError(Reason.VIDEO, "only images in files are supported")
        if self._folder is None:
            raise RecordError(Reason.MISSING_IMAGE, f"{medium.path!r}: there is no --image-folder")
        return self._inspect(str(resolve_image(medium.path, self._folder)))

    def _inspect_uncached(self, path: str) -> FoundImage:
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise RecordError(Reason.MISSING_IMAGE, f"{path} cannot be read: {error}") from error
        try:
            image = image_processing.decode_image(data, self._settings.max_image_pixels)
        except image_processing.DecompressionBombError as error:
            raise RecordError(Reason.DECOMPRESSION_BOMB, f"{path}: {error}") from error
        except image_processing.TruncatedImageError as error:
            raise RecordError(Reason.TRUNCATED_IMAGE, f"{path}: {error}") from error
        except image_processing.ImageError as error:
            raise RecordError(Reason.UNDECODABLE_IMAGE, f"{path}: {error}") from error
        return FoundImage(path, hashlib.sha256(data).hexdigest(), image.height, image.width)

    def _text_ids(self, token_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        return token_ids[~np.isin(token_ids, self.tokenizer.placeholder_ids)]

    def _check_vocabulary(self, token_ids: npt.NDArray[np.int32]) -> None:
        limit = self._settings.vocab_size
        if limit is None:
            return
        largest = int(self._text_ids(token_ids).max(initial=0))
        if largest >= limit:
            token = self.tokenizer.hf.convert_ids_to_tokens(largest)
            raise RecordError(Reason.UNKNOWN_TOKEN_ID, f"token id {largest} ({token!r}), the vocabulary has {limit}")

    def _check_length(self, token_ids: npt.NDArray[np.int32], visuals: tuple[FoundImage | FoundVideo, ...]) -> None:
        vision, limit = self._settings.vision, self._settings.seq_length
        if vision is None or limit is None:
            return
        shapes = [Frames(len(v.frames)) if isinstance(v, FoundVideo) else Picture(v.height, v.width) for v in visuals]
        visual = sum(layout.num_tokens for layout in visual_layouts(shapes, vision))
        length = len(token_ids) - len(visuals) + visual
        if length > limit:
            raise RecordError(Reason.TOO_LONG, f"{length} tokens ({visual} visual), --seq-length is {limit}")


class PrefixWriter:
    """Writes the files of a prefix aside, and moves them to their names when all of them are complete.

    A context manager. If the block is left without :meth:`finish`, nothing remains.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = Path(prefix)
        self._stack = ExitStack()
        self._image_ids: dict[str, int] = {}
        self._sizes: list[tuple[int, int]] = []
        self._lengths: list[int] = []
        self._lm_tokens: list[int] = []
        self._hashes: list[int] = []
        self._totals: Counter[str] = Counter()
        self._largest_id = 0

    def __enter__(self) -> PrefixWriter:
        self._prefix.parent.mkdir(parents=True, exist_ok=True)
        self._aside = Path(tempfile.mkdtemp(prefix=f".{self._prefix.name}.partial.", dir=self._prefix.parent))
        part = self._part
        self._tokens = self._stack.enter_context(IndexedDatasetWriter(part(names.TOKENS), np.int32))
        self._loss_mask = self._stack.enter_context(IndexedDatasetWriter(part(names.LOSS_MASK), np.uint8))
        self._images = self._stack.enter_context(IndexedDatasetWriter(part(names.IMAGES), np.uint8))
        self._image_refs = self._stack.enter_context(IndexedDatasetWriter(part(names.IMAGE_REFS), np.int32))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()
        shutil.rmtree(self._aside, ignore_errors=True)

    def _part(self, suffix: str) -> Path:
        return self._aside / f"{self._prefix.name}{suffix}"

    @property
    def num_samples(self) -> int:
        """Samples added so far."""
        return len(self._lengths)

    def add(self, sample: ProcessedSample, placeholder_ids: tuple[int, int]) -> None:
        """Append a sample, and those of its images that are new.

        Raises:
            ValueError: an image file has changed since it was looked at.
        """
        token_ids, loss_mask = sample.conversation.token_ids, sample.conversation.loss_mask
        self._tokens.add(token_ids)
        self._loss_mask.add(loss_mask)
        references: list[int] = []
        for visual in sample.visuals:
            if isinstance(visual, FoundVideo):
                references.append(-len(visual.frames))
            references += map(self._image_id, visual.frames if isinstance(visual, FoundVideo) else (visual,))
        self._image_refs.add(references)
        self._lengths.append(len(token_ids))
        self._lm_tokens.append(int(loss_mask[1:].sum()))
        self._hashes.append(sample_hash(token_ids, [bytes.fromhex(image.sha256) for image in sample.images]))
        self._totals.update(
            tokens=len(token_ids),
            loss_tokens=int(loss_mask.sum()),
            image_references=sum(1 for _ in sample.images),
            videos=sum(isinstance(visual, FoundVideo) for visual in sample.visuals),
            text_only_samples=not sample.visuals,
        )
        text = token_ids[~np.isin(token_ids, placeholder_ids)]
        self._largest_id = max(self._largest_id, int(text.max(initial=0)))

    def _image_id(self, image: FoundImage) -> int:
        known = self._image_ids.get(image.sha256)
        if known is not None:
            return known
        data = Path(image.path).read_bytes()
        if hashlib.sha256(data).hexdigest() != image.sha256:
            raise ValueError(f"{image.path} was changed while it was being preprocessed")
        self._images.add(np.frombuffer(data, dtype=np.uint8))
        self._sizes.append((image.height, image.width))
        self._totals["image_bytes"] += len(data)
        self._image_ids[image.sha256] = len(self._image_ids)
        return self._image_ids[image.sha256]

    def finish(self, processor: RecordProcessor, skipped: dict[str, int]) -> Manifest:
        """Complete the files, write the manifest and move everything to its name; the manifest comes last.

        Args:
            processor: the processor whose tokenizer and template made the samples.
            skipped: records left out, by reason.

        Returns:
            The manifest.

        Raises:
            ValueError: no sample has been added.
        """
        self._stack.close()
        digests_I32 = np.frombuffer(bytes.fromhex("".join(self._image_ids)), dtype=np.uint8).reshape(-1, 32)
        np.save(self._part(names.IMAGE_SIZES), np.array(self._sizes, dtype=np.int32).reshape(-1, 2))
        np.save(self._part(names.IMAGE_DIGESTS), digests_I32)
        np.save(self._part(names.SAMPLE_LM_TOKENS), np.array(self._lm_tokens, dtype=np.int32))
        np.save(self._part(names.SAMPLE_HASHES), np.array(self._hashes, dtype=np.uint64))
        fields = ("text_only_samples", "tokens", "loss_tokens", "image_references", "image_bytes", "videos")
        counts = Counts(
            samples=len(self._lengths),
            images=len(self._sizes),
            longest_sample=max(self._lengths),
            largest_token_id=self._largest_id,
            **{name: self._totals[name] for name in fields},
        )
        manifest = Manifest(
            format_version=names.FORMAT_VERSION,
            tokenizer_fingerprint=processor.tokenizer.fingerprint,
            image_token_id=processor.tokenizer.image_token_id,
            video_token_id=processor.tokenizer.video_token_id,
            chat_template=processor.template.name,
            chat_template_sha256=processor.template.sha256,
            counts=counts,
            skipped=dict(sorted(skipped.items())),
            files={suffix: _file_entry(self._part(suffix)) for suffix in names.DATA_SUFFIXES},
        )
        images = f"{names.IMAGES}.bin"
        manifest.files[images] = FileEntry(
            manifest.files[images].bytes, hashlib.sha256(digests_I32.tobytes()).hexdigest()
        )
        manifest.write(self._part(names.MANIFEST_SUFFIX))
        # Files without a manifest cannot be read, so nobody ever reads a mixture of old and new files.
        Path(f"{self._prefix}{names.MANIFEST_SUFFIX}").unlink(missing_ok=True)
        for suffix in (*names.DATA_SUFFIXES, names.MANIFEST_SUFFIX):
            os.replace(self._part(suffix), f"{self._prefix}{suffix}")
        return manifest


def _file_entry(path: Path) -> FileEntry:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return FileEntry(path.stat().st_size, digest.hexdigest())
