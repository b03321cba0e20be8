"""Runnable examples: a demo on rendered scenes (quickstart), NLVR, and launch scripts for large models."""
