"""Distributed training of HaploVL, an early-fusion vision-language model in one transformer (ICML 2025)."""

__version__ = "0.1.0"
