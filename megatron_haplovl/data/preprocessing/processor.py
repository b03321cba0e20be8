"""From one record to samples with their media. :mod:`.prefix_writer` makes files of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data import image_processing
from megatron_haplovl.data.chat_template import ConversationEncoder, EncodedConversation, load_chat_template
from megatron_haplovl.data.image_geometry import visual_layouts
from megatron_haplovl.data.layouts.documents import find_media
from megatron_haplovl.data.layouts.normalise import NormaliseOptions, normalise
from megatron_haplovl.data.manifest import Origin
from megatron_haplovl.data.preprocessing.image_folders import open_folders
from megatron_haplovl.data.preprocessing.long_samples import fit_record
from megatron_haplovl.data.preprocessing.media import FoundImage, FoundVideo, MediaFinder
from megatron_haplovl.data.preprocessing.video import FrameSettings
from megatron_haplovl.data.records import RawRecord, Reason, Record, RecordError
from megatron_haplovl.data.tokenizer import load_tokenizer

Visuals = tuple[FoundImage | FoundVideo, ...]


@dataclass(frozen=True)
class ProcessorSettings:
    """All that a worker needs to build its own :class:`RecordProcessor`."""

    tokenizer_model: str
    chat_template: str
    image_folders: tuple[str, ...] = ()
    """Where image paths begin, searched in this order."""
    image_roots: tuple[str, ...] = ()
    """Further folders into which links may lead."""
    normalise: NormaliseOptions = NormaliseOptions()
    max_image_pixels: int = image_processing.DEFAULT_MAX_PIXELS
    vocab_size: int | None = None
    """If given, token ids must be below it."""
    vision: VisionConfig | None = None
    seq_length: int | None = None
    """If given (with `vision`), samples must not be longer."""
    long_samples: str = "error"
    """What becomes of those that are: one of `data.preprocessing.long_samples.LONG_SAMPLES`."""
    frames: FrameSettings = FrameSettings()
    """Which frames are taken of a video."""


@dataclass(frozen=True)
class ProcessedSample:
    """A record that can be used."""

    conversation: EncodedConversation
    visuals: Visuals
    repairs: tuple[str, ...] = ()
    """Repairs that the record had. Of a record that became several samples, the first has them."""
    unread_keys: tuple[str, ...] = ()
    """Keys of the record that nothing reads, likewise."""

    @property
    def images(self) -> Iterator[FoundImage]:
        """Images and frames, in order."""
        for visual in self.visuals:
            yield from visual.images


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used: one line of the report."""

    location: str
    id: str | None
    reason: str
    detail: str


@dataclass(frozen=True)
class LeftOut(BadRecord):
    """A record that is left out because the settings say so; it is reported and counted, and is no error."""


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
        folders = open_folders(settings.image_folders, settings.image_roots)
        self._media = MediaFinder(folders, settings.max_image_pixels, settings.frames)

    @property
    def origin(self) -> Origin:
        """What makes the samples, for the manifest."""
        tokenizer, template = self.tokenizer, self.template
        return Origin(
            tokenizer.fingerprint, tokenizer.image_token_id, tokenizer.video_token_id, template.name, template.sha256
        )

    @property
    def num_frames(self) -> int:
        """Frames that are taken of a video."""
        return self._settings.frames.num_frames

    def process(self, raw: RawRecord) -> list[ProcessedSample] | BadRecord:
        """Process one record; whatever is wrong with it is in the result."""
        try:
            normalised = normalise(raw, self._settings.normalise)
            record, visuals = find_media(normalised.record, self._media.find, normalised.mending)
            samples, changes = self._fit(record, visuals)
        except RecordError as error:
            is_left_out = error.reason is Reason.TOO_LONG and self._settings.long_samples == "skip"
            kind = LeftOut if is_left_out else BadRecord
            return kind(raw.location, raw.id, error.reason.value, error.detail)
        first = replace(samples[0], repairs=(*normalised.repairs, *changes), unread_keys=normalised.unread_keys)
        return [first, *samples[1:]]

    def _fit(self, record: Record, visuals: Visuals) -> tuple[list[ProcessedSample], tuple[str, ...]]:
        """The samples of a record, each short enough, and what had to be done for that.

        Raises:
            RecordError: it cannot be encoded, or is too long and the settings do not change that.
        """
        # By identity: a piece has the record's own media.
        visual_of = dict(zip(map(id, record.media), visuals, strict=True))

        def sample_of(piece: Record) -> ProcessedSample:
            return ProcessedSample(self._encoder.encode(piece), tuple(visual_of[id(m)] for m in piece.media))

        whole = sample_of(record)
        self._check_vocabulary(whole.conversation.token_ids)
        too_long = self._find_too_long(whole)
        if too_long is None:
            return [whole], ()
        if self._settings.long_samples not in ("cut", "split"):
            raise RecordError(Reason.TOO_LONG, too_long)
        fitted = fit_record(
            record, lambda piece: self._find_too_long(sample_of(piece)) is None, self._settings.long_samples
        )
        if not fitted.pieces:
            raise RecordError(Reason.TOO_LONG, f"{too_long}; no turn at its beginning fits")
        return [sample_of(piece) for piece in fitted.pieces], fitted.repairs

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

    def _find_too_long(self, sample: ProcessedSample) -> str | None:
        """How long a sample is that is longer than allowed."""
        vision, limit = self._settings.vision, self._settings.seq_length
        if vision is None or limit is None:
            return None
        visuals = sample.visuals
        layouts = visual_layouts([visual.shape for visual in visuals], vision)
        visual = sum(layout.num_tokens for layout in layouts)
        length = len(sample.conversation.token_ids) - len(visuals) + visual
        return f"{length} tokens ({visual} visual), --seq-length is {limit}" if length > limit else None
