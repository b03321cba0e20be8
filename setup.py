"""Package metadata. Exact versions for a reproducible environment are in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

_ROOT = Path(__file__).parent
_VERSION = re.search(r'^__version__ = "(.+)"$', (_ROOT / "megatron_haplovl/__init__.py").read_text(), re.MULTILINE)
assert _VERSION is not None

setup(
    name="megatron-haplovl",
    version=_VERSION[1],
    description="Distributed training of HaploVL, an early-fusion vision-language model in one transformer",
    long_description=(_ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_haplovl", "megatron_haplovl.*"]),
    package_data={"megatron_haplovl": ["py.typed"], "megatron_haplovl.data": ["templates/*.jinja"]},
    entry_points={
        "console_scripts": [
            *(
                f"haplovl-{command} = megatron_haplovl.commands.{command}:main"
                for command in ("preprocess", "merge", "convert", "evaluate", "generate", "plan", "verify")
            ),
            # A module of the name `inspect` would hide Python's own from those beside it.
            "haplovl-inspect = megatron_haplovl.commands.inspect_data:main",
            "haplovl-report = megatron_haplovl.commands.report_run:main",
        ]
    },
    python_requires=">=3.11",
    # The lower bounds are tested by tests/lower_bounds.txt (see CONTRIBUTING.md).
    install_requires=[
        "torch>=2.11",
        # Its privates are used (megatron_haplovl/engine), and may change in any release. tests/distributed/test_zero.py
        # fails with 0.18.0 (gradient norm under ZeRO 2), 0.19.0 and 0.19.4 (bf16, ZeRO 1, optimizer on the host).
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.17",
        "tokenizers>=0.23.1",
        "safetensors>=0.8",
        "sentencepiece>=0.2",
        "protobuf>=4.21.12",
        "numpy>=1.26",
        "pillow>=10",
        "jinja2>=3.1",
        "pyyaml>=6.0.1",
        "tqdm>=4.60",
        "pyarrow>=17",
        "zstandard>=0.22",
    ],
    extras_require={
        "examples": ["matplotlib>=3.8"],
        "report": ["matplotlib>=3.8"],
        "video": ["av>=18.1"],
        "tracking": ["tensorboard", "wandb"],
        "live": ["rich>=13"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "megatron-core>=0.16",
            "av>=18.1",
            "tensorboard",
            "matplotlib>=3.8",
            "setuptools>=77",
            "triton>=3.6; platform_system == 'Linux'",
        ],
        "dev": ["ruff>=0.14", "mypy>=1.18", "import-linter>=2.16", "pre-commit>=4"],
    },
)
