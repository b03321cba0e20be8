"""Initial weights of what is not inherited from a pretrained model."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import torch
from torch import nn


def initialize_weights(parameters: Mapping[str, nn.Parameter], std: float, seed: int) -> None:
    """Fill parameters with :func:`initial_value`."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(initial_value(name, parameter.shape, std, seed))


def initial_value(name: str, shape: torch.Size, std: float, seed: int) -> torch.Tensor:
    """The value that a parameter starts with, from a random stream of its own.

    The stream depends on the seed and the parameter's name only, so a parameter starts with the same values whatever
    else the model holds and however it is split over ranks.

    Matrices and embeddings are normal with the given deviation; norms are one, biases zero.
    """
    leaf = name.rsplit(".", 1)[-1]
    if name == "distillation.logit_scale":
        return torch.full(shape, math.log(1 / 0.07))  # CLIP's initial temperature
    if "norm" in name and leaf == "weight":
        return torch.ones(shape)
    if leaf == "bias":
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(seed * 2**32 + zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator) * std
