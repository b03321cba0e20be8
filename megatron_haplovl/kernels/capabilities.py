"""Which optional kernels this machine offers. No other module asks whether one is installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util


def has_apex() -> bool:
    """Whether NVIDIA apex is installed with its CUDA extensions (PyPI has another package of that name)."""
    return importlib.util.find_spec("apex") is not None and importlib.util.find_spec("amp_C") is not None


def has_flash_attention_2() -> bool:
    """Whether the flash-attn package is installed, 2.7 or newer (log-sum-exp without padding)."""
    # Not looked up by its module, because flash-attn-4 has a part of the same name.
    installed = _version("flash-attn")
    return installed is not None and (2, 7) <= installed < (3, 0)


def has_flash_attention_3() -> bool:
    """Whether FlashAttention-3 is installed."""
    return importlib.util.find_spec("flash_attn_interface") is not None


def has_flash_attention_4() -> bool:
    """Whether the package flash-attn-4 is installed."""
    return _version("flash-attn-4") is not None


def has_triton() -> bool:
    """Whether Triton is installed, for our own GPU kernels."""
    return importlib.util.find_spec("triton") is not None


def has_flex() -> bool:
    """Whether FlexAttention can be compiled for a GPU; torch needs Triton for that."""
    return has_triton()


def has_liger() -> bool:
    """Whether Liger's Triton kernels are installed; the benchmarks compare with them on a GPU."""
    return importlib.util.find_spec("liger_kernel") is not None


def _version(package: str) -> tuple[int, int] | None:
    """Major and minor version of an installed package."""
    try:
        major, minor = importlib.metadata.version(package).split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return None
    return int(major), int(minor)
