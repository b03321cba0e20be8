"""What most programs under test import. The server in `forks.py` does so once, and they are copies of it."""

from __future__ import annotations

import gc

import deepspeed  # noqa: F401
import torch._inductor.compile_fx
import torch.utils.cpp_extension  # noqa: F401
from deepspeed.ops.adam import DeepSpeedCPUAdam  # noqa: F401
from deepspeed.runtime.pipe.engine import PipelineEngine  # noqa: F401
from PIL import Image
from transformers import AutoModelForImageTextToText, CLIPVisionModel, LlamaForCausalLM  # noqa: F401

from megatron_haplovl import finetune, pretrain  # noqa: F401
from megatron_haplovl.commands import convert, evaluate, generate  # noqa: F401

Image.init()
# The collector would look at all of this again and again, and so copy its pages in every program.
gc.freeze()
