"""From text, images and videos to the inputs of the model: expanded marks, the mask's vector and patch sources."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from megatron_haplovl.data.image_geometry import image_layout, vision_of_sample
from megatron_haplovl.hf.image_processing_haplo import HaploImageProcessor
from megatron_haplovl.hf.modeling_haplo import NEWLINE, TEXT

_IntArray = npt.NDArray[np.int64]


class HaploProcessor(ProcessorMixin):
    """A tokenizer and an image processor that know how an image stands in the sequence.

    Args:
        image_processor: a :class:`HaploImageProcessor`.
        tokenizer: one that has `image_token` and `video_token` as single tokens.
        chat_template: Jinja template for messages in the Hugging Face form; default: the tokenizer's.
        num_image_tokens: patches of one tile; checked against the image processor.
        image_token: the mark that stands for an image in the text.
        video_token: the mark that stands for a video.

    Raises:
        ValueError: the tokenizer lacks a mark, or `num_image_tokens` does not fit.
    """

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        chat_template: str | None = None,
        num_image_tokens: int | None = None,
        image_token: str = "<image>",
        video_token: str = "<video>",
    ) -> None:
        cells = image_processor.vision.cells_per_tile
        if num_image_tokens not in (None, cells):
            raise ValueError(f"num_image_tokens is {num_image_tokens}, but a tile has {cells} patches")
        self.num_image_tokens = cells
        self.image_token = image_token
        self.video_token = video_token
        template = tokenizer.chat_template if chat_template is None else chat_template
        super().__init__(image_processor, tokenizer, chat_template=template)
        self.image_token_id = self._mark_id(image_token)
        self.video_token_id = self._mark_id(video_token)

    def _mark_id(self, mark: str) -> int:
        token_id = self.tokenizer.convert_tokens_to_ids(mark)
        if token_id is None or token_id == self.tokenizer.unk_token_id:
            raise ValueError(f"the tokenizer has no token {mark!r}")
        return int(token_id)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "visual_source", "attention_start_ids"]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        audio: None = None,
        *,
        add_special_tokens: bool = False,
        padding: bool | str = True,
        padding_side: str = "left",
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare a batch.

        Args:
            images: one image; a list, for one text or in the order of all marks; or one list per text.
            text: one text or several. Each `image_token` and `video_token` in it stands for one image or video.
            videos: one video (a list of frames); a list of videos; or one list of videos per text.
            audio: only None; `apply_chat_template` passes it.
            add_special_tokens: let the tokenizer add its own; the chat template has written them already.
            padding: shorter texts are always padded to the longest, so only True (or "longest") is accepted where
                lengths differ.
            padding_side: "left" (for `generate`) or "right".
            return_tensors: "pt".

        Returns:
            `input_ids`, `attention_mask` [B, S]; with images or videos also `pixel_values` [T, 3, height, width],
            `visual_source` and `attention_start_ids` [B, S] (see `modeling_haplo`).

        Raises:
            ValueError: marks and images (or videos) that do not match in number, or an unknown argument.
        """
        if audio is not None:
            raise ValueError("audio is not supported")
        if kwargs:
            raise ValueError(f"unknown arguments: {', '.join(sorted(kwargs))}")
        if return_tensors not in ("pt", None):
            raise ValueError(f"return_tensors {return_tensors!r} is not supported, only 'pt'")
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side {padding_side!r} is neither 'left' nor 'right'")
        if text is None:
            raise ValueError("text is needed: it says where the images stand")
        texts = [text] if isinstance(text, str) else list(text)
        ids = [self.tokenizer(one, add_special_tokens=add_special_tokens)["input_ids"] for one in texts]
        images_of = _distribute(images, [row.count(self.image_token_id) for row in ids], "image", depth=0)
        videos_of = _distribute(videos, [row.count(self.video_token_id) for row in ids], "video", depth=1)

        tiles: list[torch.Tensor] = []
        rows = []
        for row_ids, row_images, row_videos in zip(ids, images_of, videos_of, strict=True):
            rows.append(self._expand(row_ids, iter(row_images), iter(row_videos), tiles))
        longest = max(len(row[0]) for row in rows)
        if padding not in (True, "longest") and any(len(row[0]) != longest for row in rows):
            raise ValueError(f"the texts have different lengths, which padding={padding!r} cannot hold in one tensor")

        data = _stack(rows, longest, padding_side, self._pad_id())
        if tiles:
            data["pixel_values"] = torch.cat(tiles)
        else:
            del data["visual_source"], data["attention_start_ids"]
        return BatchFeature(data=data)

    def _pad_id(self) -> int:
        tokenizer = self.tokenizer
        return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)

    def _expand(
        self,
        token_ids: list[int],
        images: Iterator[Image.Image],
        videos: Iterator[Sequence[Image.Image]],
        tiles: list[torch.Tensor],
    ) -> tuple[_IntArray, _IntArray, _IntArray]:
        """Replace every mark by as many copies as it has visual tokens.

        Returns:
            Token ids, visual sources and start ids (counted from the sequence's first token), each [S]; the tiles are
            appended to `tiles`.
        """
        parts: list[tuple[_IntArray, _IntArray, _IntArray]] = []
        position = 0
        visuals = sum(token in (self.image_token_id, self.video_token_id) for token in token_ids)
        for token in token_ids:
            if token == self.image_token_id:
                blocks = self._image_blocks(next(images), visuals, tiles)
            elif token == self.video_token_id:
                blocks = self._video_blocks(next(videos), tiles)
            else:
                blocks = [np.array([TEXT])]
            for source in blocks:
                parts.append((np.full(len(source), token), source, np.full(len(source), position)))
                position += len(source)
        token_array, sources, starts = (np.concatenate(column) for column in zip(*parts, strict=True))
        return token_array, sources, starts

    def _image_blocks(self, image: Image.Image, visuals: int, tiles: list[torch.Tensor]) -> list[_IntArray]:
        """The visual sources of an image: one block, in which all tokens see each other.

        `visuals` is the number of images and videos in the text, on which the number of tiles depends.
        """
        features = self.image_processor(image, visuals_in_sample=visuals, return_tensors="pt")
        height, width = features["image_sizes"][0].tolist()
        layout = image_layout(height, width, vision_of_sample(visuals, self.image_processor.vision))
        source = np.full(layout.num_tokens, NEWLINE)
        source[layout.patch_offsets()] = layout.patch_source() + self._patches_before(tiles)
        tiles.append(features["pixel_values"])
        return [source]

    def _video_blocks(self, frames: Sequence[Image.Image], tiles: list[torch.Tensor]) -> list[_IntArray]:
        """The visual sources of a video: one block for each frame, and a newline at the end, a block of its own."""
        first = self._patches_before(tiles)
        if isinstance(frames, str):
            raise ValueError(f"a video is its frames in order (images, or arrays [height, width, 3]), not {frames!r}")
        # An array [frames, height, width, 3] is one, too.
        features = self.image_processor.preprocess_frames(list(frames), return_tensors="pt")
        tiles.append(features["pixel_values"])
        cells = self.num_image_tokens
        blocks = [np.arange(first + i * cells, first + (i + 1) * cells) for i in range(len(features["pixel_values"]))]
        return [*blocks, np.array([NEWLINE])] if self.image_processor.image_newline else blocks

    def _patches_before(self, tiles: list[torch.Tensor]) -> int:
        return sum(len(part) for part in tiles) * self.num_image_tokens

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        # Named directly: AutoImageProcessor needs torchvision in older releases of transformers 5.
        return [
            HaploImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs),
            cls._load_tokenizer_from_pretrained("tokenizer", pretrained_model_name_or_path, **kwargs),
        ]

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Write the files of the released format: tokenizer, preprocessor, processor and video processor.

        Raises:
            ValueError: `push_to_hub`, or an unknown argument.
        """
        if push_to_hub or kwargs:
            raise ValueError("save the folder, then upload it; other arguments of save_pretrained are not supported")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.chat_template = self.chat_template
        self.tokenizer.save_pretrained(str(folder))
        self.image_processor.save_pretrained(str(folder))
        video_folder = folder / "video_processor"
        self.image_processor.save_pretrained(str(video_folder))
        settings = {
            "processor_class": type(self).__name__,
            "num_image_tokens": self.num_image_tokens,
            "image_token": self.image_token,
            "video_token": self.video_token,
        }
        (folder / "processor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return [str(folder / "processor_config.json")]


def _distribute(given: Any, marks: list[int], what: str, *, depth: int) -> list[list[Any]]:
    """Hand the images (or videos) out to the texts, and check that each mark gets one.

    Args:
        given: one item, a list of items, or one list of items per text.
        marks: number of marks in each text.
        what: "image" or "video", for the message.
        depth: how many lists one item is made of (an image 0, a video 1).
    """
    if given is None:
        nested: list[list[Any]] = [[] for _ in marks]
    else:
        nesting = _nesting(given) - depth
        items = [given] if nesting <= 0 else list(given)
        if nesting >= 2:
            nested = [list(row) if row is not None else [] for row in items]
        elif len(marks) == 1:
            nested = [items]
        elif len(items) == sum(marks):
            ends = np.cumsum(marks)
            nested = [items[end - count : end] for end, count in zip(ends, marks, strict=True)]
        else:
            raise ValueError(f"{len(items)} {what}s were given for {sum(marks)} {what} marks in {len(marks)} texts")
    if len(nested) != len(marks):
        raise ValueError(f"{what}s for {len(nested)} texts were given, but there are {len(marks)} texts")
    for i, (row, count) in enumerate(zip(nested, marks, strict=True)):
        if len(row) != count:
            raise ValueError(f"text {i} has {count} {what} marks, but {len(row)} {what}s were given for it")
    return nested


def _nesting(value: Any) -> int:
    """How many lists deep an image lies. An array [N, height, width, 3] is a list of images."""
    if isinstance(value, np.ndarray):
        return max(value.ndim - 3, 0)
    if not isinstance(value, (list, tuple)):
        return 0
    return 1 + max((_nesting(item) for item in value), default=0)


def _stack(
    rows: list[tuple[_IntArray, _IntArray, _IntArray]], length: int, side: str, pad_id: int
) -> dict[str, torch.Tensor]:
    """Pad every sequence to `length`."""
    data = {
        "input_ids": torch.full((len(rows), length), pad_id),
        "attention_mask": torch.zeros(len(rows), length, dtype=torch.int64),
        "visual_source": torch.full((len(rows), length), TEXT),
        "attention_start_ids": torch.arange(length).repeat(len(rows), 1),
    }
    for i, (token_ids, sources, starts) in enumerate(rows):
        first = length - len(token_ids) if side == "left" else 0
        span = slice(first, first + len(token_ids))
        data["input_ids"][i, span] = torch.from_numpy(token_ids)
        data["attention_mask"][i, span] = 1
        data["visual_source"][i, span] = torch.from_numpy(sources)
        data["attention_start_ids"][i, span] = torch.from_numpy(starts) + first
    return data
