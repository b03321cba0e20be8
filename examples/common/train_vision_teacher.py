"""Train a small CLIP contrastively on captioned images, and save it as an ordinary Hugging Face CLIPModel folder.

Its vision half has the sizes of a HaploVL preset's pre-decoder, so that it can initialise and teach it. The file
`teacher.json` beside the weights says how well it retrieves held-out captions.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

from examples.common.samples import CaptionedImage, endless_batches, load_captions, load_tiles, pad_tokens
from examples.common.teacher_loop import train
from megatron_haplovl.config.presets import MODELS
from megatron_haplovl.config.schema import ModelConfig
from megatron_haplovl.conversion.hf_compatibility import vision_config_of
from megatron_haplovl.data.image_processing import CLIP_MEAN, CLIP_STD
from megatron_haplovl.data.tokenizer import load_tokenizer

_TEXT_LAYERS = 2
_MAX_CAPTION_TOKENS = 128


def build_clip(model: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """A CLIP with random weights whose vision half has the sizes of `model`'s pre-decoder."""
    width = model.pre.hidden_size
    assert tokenizer.eos_token_id != 2, "CLIPTextModel reads an end-of-sequence id of 2 as `take the largest id`"
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": _TEXT_LAYERS,
        "num_attention_heads": model.pre.num_attention_heads,
        "max_position_embeddings": _MAX_CAPTION_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    eyes = vision_config_of(model).to_dict()
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=eyes, projection_dim=width))
    # Beside pixels, whose embedding has a size of about one, CLIP's usual start of 0.02 hides where a patch is; a short
    # training would hardly find it again.
    torch.nn.init.normal_(clip.vision_model.embeddings.position_embedding.weight, std=1.0)
    return clip


class CaptionBatches:
    """Captioned images in memory: pixels as tiles, captions as token ids."""

    def __init__(self, items: list[CaptionedImage], model: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> None:
        # A CLIP sees one tile; an image of several tiles is shown to it as a whole.
        self.vision = model.vision
        self.items = items
        self.pad_id = int(tokenizer.pad_token_id)
        captions = tokenizer([item.caption for item in items], add_special_tokens=False)["input_ids"]
        self.captions = [[*ids[: _MAX_CAPTION_TOKENS - 1], int(tokenizer.eos_token_id)] for ids in captions]

    def pixels(self, indices: list[int]) -> torch.Tensor:
        """[B, 3, H, W]."""
        return torch.cat([load_tiles(self.items[i].path, self.vision) for i in indices])

    def text(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask, both [B, S]."""
        return pad_tokens([self.captions[i] for i in indices], self.pad_id)


@torch.no_grad()
def retrieval_accuracy(clip: CLIPModel, batches: CaptionBatches) -> float:
    """Share of the images whose own caption is the nearest of all captions."""
    everything = list(range(len(batches.items)))
    ids_BS, mask_BS = batches.text(everything)
    logits_BB = clip(input_ids=ids_BS, attention_mask=mask_BS, pixel_values=batches.pixels(everything)).logits_per_image
    return float((logits_BB.argmax(dim=-1) == torch.arange(len(everything))).float().mean())


def main() -> None:
    args = build_parser().parse_args()
    torch.manual_seed(args.seed)
    model = MODELS[args.model]
    tokenizer = load_tokenizer(args.tokenizer_model).hf
    clip = build_clip(model, tokenizer)
    data = CaptionBatches(load_captions(args.train, args.image_folder), model, tokenizer)
    heldout = CaptionBatches(load_captions(args.heldout, args.image_folder), model, tokenizer)
    indices = endless_batches(len(data.items), args.batch_size, random.Random(args.seed))

    def loss_of_step() -> torch.Tensor:
        batch = next(indices)
        ids_BS, mask_BS = data.text(batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            output = clip(input_ids=ids_BS, attention_mask=mask_BS, pixel_values=data.pixels(batch), return_loss=True)
        return output.loss

    train(clip, loss_of_step, steps=args.steps, lr=args.lr, name="vision teacher")
    accuracy = retrieval_accuracy(clip, heldout)
    print(
        f"vision teacher: finds {accuracy:.1%} of {len(heldout.items)} held-out captions "
        f"(chance {1 / len(heldout.items):.1%})"
    )

    clip.save_pretrained(args.output)
    size = model.vision.image_size
    CLIPImageProcessor(
        size={"height": size, "width": size},
        do_center_crop=False,
        image_mean=list(CLIP_MEAN),
        image_std=list(CLIP_STD),
    ).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    report = {"heldout_retrieval_accuracy": accuracy, "heldout_images": len(heldout.items)}
    (args.output / "teacher.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="LLaVA JSON of captions")
    parser.add_argument("--heldout", type=Path, required=True, help="LLaVA JSON of held-out captions")
    parser.add_argument("--image-folder", type=Path, required=True, help="folder that image paths start from")
    parser.add_argument("--tokenizer-model", type=Path, required=True, help="tokenizer folder or .model")
    parser.add_argument("--model", choices=sorted(MODELS), default="haplovl-debug", help="preset whose sizes are used")
    parser.add_argument("--output", type=Path, required=True, help="folder that receives the CLIPModel")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=64, help="pairs in a batch")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--seed", type=int, default=1234, help="seed of weights and order")
    return parser


if __name__ == "__main__":
    main()
