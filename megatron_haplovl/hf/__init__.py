"""Hugging Face classes of the released Haplo format. Importing this package registers them with the Auto classes."""

import contextlib

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from megatron_haplovl.hf.configuration_haplo import HaploConfig
from megatron_haplovl.hf.image_processing_haplo import HaploImageProcessor
from megatron_haplovl.hf.modeling_haplo import HaploForConditionalGeneration, HaploModel
from megatron_haplovl.hf.processing_haplo import HaploProcessor

AutoConfig.register("haplo", HaploConfig)
AutoModelForImageTextToText.register(HaploConfig, HaploForConditionalGeneration)
AutoModelForCausalLM.register(HaploConfig, HaploForConditionalGeneration)
# Older releases of transformers 5 offer AutoImageProcessor only where torchvision is installed. HaploProcessor does not
# need it.
with contextlib.suppress(ImportError):
    AutoImageProcessor.register(HaploConfig, image_processor_classes={"pil": HaploImageProcessor})
AutoProcessor.register(HaploConfig, HaploProcessor)

__all__ = ["HaploConfig", "HaploForConditionalGeneration", "HaploImageProcessor", "HaploModel", "HaploProcessor"]
