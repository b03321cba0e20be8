"""Initial weights of what is not inherited from a pretrained model."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import torch
from torch import nn


def initialize_weights(parameters: Mapping[str, nn.Parameter], std: float, seed: int) -> None:
    """Fill parameters, each from a random stream of its own.

    The stream depends on the seed and the parameter's name only, so a parameter starts with the same values whatever
    else the model holds and however it is split over ranks.

    Matrices and embeddings are normal with the given deviation; norms are one, biases zero.
    """
    with torch.no_grad():
        for name, parameter in parameters.items():
            leaf = name.rsplit(".", 1)[-1]
            if name == "distillation.logit_scale":
                parameter.fill_(math.log(1 / 0.07))  # CLIP's initial temperature
            elif "norm" in name and leaf == "weight":
                parameter.fill_(1.0)
            elif leaf == "bias":
                parameter.zero_()
            else:
                generator = torch.Generator().manual_seed(seed * 2**32 + zlib.crc32(name.encode()))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
