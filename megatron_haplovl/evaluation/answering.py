"""Questions about images, answered by an exported model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from megatron_haplovl.config.files import read_json
from megatron_haplovl.data.bounded import TooLongError, bounded
from megatron_haplovl.data.chat_template import RENDER_BYTES, RENDER_SECONDS
from megatron_haplovl.data.image_processing import decode_image
from megatron_haplovl.data.tokenizer import IMAGE_MARK
from megatron_haplovl.hf.modeling_haplo import HaploForConditionalGeneration
from megatron_haplovl.hf.processing_haplo import HaploProcessor


@dataclass(frozen=True)
class Answerer:
    """A model and its processor. Made by :func:`load_answerer`."""

    model: HaploForConditionalGeneration
    processor: HaploProcessor

    @torch.inference_mode()
    def answer(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[Path]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
    ) -> list[str]:
        """Answer a batch of single-turn questions.

        Args:
            prompts: questions; if one has images but no marks, a mark for each image is put before it.
            images: the image files of each question.
            max_new_tokens: longest answer in tokens.
            temperature: 0 decodes greedily; above 0 the answer is sampled.

        Returns:
            The answers, without special tokens and surrounding spaces.

        Raises:
            ValueError: marks that do not match the images, or an image that cannot be decoded.
        """
        texts = []
        for prompt, paths in zip(prompts, images, strict=True):
            content = prompt if IMAGE_MARK in prompt else f"{IMAGE_MARK}\n" * len(paths) + prompt
            texts.append(self._render(content))
        decoded = [[_read_image(path) for path in paths] for paths in images]
        inputs = self.processor(text=texts, images=decoded).to(self.model.device)
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)  # type: ignore[misc]
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]

    def _render(self, content: str) -> str:
        """A question as the model's chat template writes it. The template is a program that came with the folder.

        Raises:
            ValueError: it does not end, or takes too much memory.
        """
        messages = [{"role": "user", "content": content}]
        try:
            with bounded(RENDER_SECONDS, RENDER_BYTES):
                return str(self.processor.apply_chat_template(messages, add_generation_prompt=True))
        except TooLongError:
            raise ValueError(
                f"the model's chat template has not written the question in {RENDER_SECONDS} s; does it loop?"
            ) from None
        except MemoryError:
            raise ValueError(
                f"the model's chat template takes more than {RENDER_BYTES >> 20} MiB to write the question"
            ) from None


def _read_image(path: Path) -> Image.Image:
    try:
        return decode_image(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def load_answerer(folder: str | Path, device: str = "auto") -> Answerer:
    """Load an exported model in the number format in which it is stored.

    Args:
        folder: a model in the released Haplo format.
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".

    Raises:
        ValueError: the folder does not hold such a model, or the device does not exist.
    """
    folder = Path(folder)
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type != "haplo":
        raise ValueError(
            f"{folder}/config.json: model_type is {model_type!r}, not 'haplo'; export training checkpoints with "
            "haplovl-convert"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: there is no GPU that torch can use")
    model = HaploForConditionalGeneration.from_pretrained(
        folder, dtype="auto", local_files_only=True, trust_remote_code=False
    )
    return Answerer(
        model.eval().to(device), HaploProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    )
