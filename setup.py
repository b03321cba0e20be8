"""Package metadata. Exact versions for a reproducible environment are in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megatron-haplovl",
    version="0.1.0",
    description="Distributed training of HaploVL, an early-fusion vision-language model in one transformer",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_haplovl", "megatron_haplovl.*"]),
    package_data={"megatron_haplovl.data": ["templates/*.jinja"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.18",
        "transformers>=5.17",
        "tokenizers>=0.22",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "protobuf",
        "numpy>=1.26",
        "pillow>=10",
        "jinja2>=3.1",
        "pyyaml>=6",
        "tqdm",
    ],
    extras_require={
        "examples": ["matplotlib>=3.8"],
        "tracking": ["tensorboard", "wandb"],
        "test": [
            "pytest>=8",
            "megatron-core>=0.16",
            "tensorboard",
            "matplotlib>=3.8",
            "triton>=3.6; platform_system == 'Linux'",
        ],
        "dev": ["ruff>=0.14", "mypy>=1.18", "import-linter>=2.5"],
    },
)
