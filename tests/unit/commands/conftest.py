"""The tool that preprocesses records of every layout, for all tests of this folder."""

from tests.layouts import layout_images, tool

__all__ = ["layout_images", "tool"]
