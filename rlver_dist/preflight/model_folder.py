"""A Hugging Face model folder, read as files alone: whether engines and learner can use what is in there.

Nothing here imports torch. What a folder lacks would otherwise be found out by vLLM or transformers, minutes
later and as a traceback from an actor.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from rlver_dist.errors import ConfigError, DataError

TRAINABLE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Architectures whose log-probs in the learner equal the engines', as `tests/integration/test_models.py`
shows of each."""
SCALED_BY_FACTOR = ("linear", "dynamic")
"""Kinds of rotary embeddings that reach further than `max_position_embeddings`, by their `factor`; the other
kinds have it in that number already (vLLM's `_get_and_verify_max_len`)."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LFS_POINTER = b"version https://git-lfs"
MISTRAL_WINDOW = 4096
"""Window of a Mistral model whose `config.json` does not name one (transformers' `MistralConfig`)."""


@dataclass(kw_only=True, slots=True, frozen=True)
class ModelFolder:
    """A folder that holds a model's configuration, weights and tokenizer.

    Attributes:
        path: the folder.
        where: the option and its value as the user gave it, for errors.
        config: `config.json`.
        shapes: shape of every tensor by name; empty where the weights have not been downloaded.
    """

    path: Path
    where: str
    config: dict[str, object]
    shapes: dict[str, list[int]]

    @property
    def architecture(self) -> str:
        """The class that the weights belong to, such as `Qwen2ForCausalLM`; empty where none is named."""
        named = self.config.get("architectures")
        return str(named[0]) if isinstance(named, list) and named else ""

    @property
    def num_layers(self) -> int:
        """Transformer layers.

        Raises:
            DataError: the configuration does not say how many.
        """
        value = self.config.get("num_hidden_layers")
        if not isinstance(value, int) or value < 1:
            raise DataError(
                f"{self.where}: num_hidden_layers={value!r} in {self.path / 'config.json'} is no number of "
                f"layers; use a folder that save_pretrained wrote"
            )
        return value

    @property
    def longest_context(self) -> float:
        """Most tokens that the positions reach; infinite where the configuration does not say."""
        reach = self.config.get("max_position_embeddings")
        if not isinstance(reach, int):
            return math.inf
        # transformers 5 writes `rope_parameters`, earlier ones `rope_scaling` and, at first, `type`.
        rope = self.config.get("rope_parameters") or self.config.get("rope_scaling")
        if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) in SCALED_BY_FACTOR:
            return reach * float(rope.get("factor") or 1)
        return reach

    @property
    def attention_window(self) -> int | None:
        """Tokens that a layer with a sliding window sees; None where every layer sees all."""
        if self.architecture == "MistralForCausalLM":
            window = self.config.get("sliding_window", MISTRAL_WINDOW)
        elif self.config.get("use_sliding_window"):
            window = self.config.get("sliding_window")
        else:
            window = None
        return window if isinstance(window, int) else None

    def check_context(self, key: str, max_context_tokens: int) -> None:
        """Refuse a context that is longer than the model's; `key` is the option that asks for it.

        Raises:
            ConfigError: names both.
        """
        if max_context_tokens > self.longest_context:
            raise ConfigError(
                f"{key}={max_context_tokens}: {self.where} has positions for {self.longest_context:.0f} "
                f"tokens; use at most that many"
            )

    def check_trainable(self, max_context_tokens: int) -> None:
        """Refuse a model that the learner would not train as the engines sample it.

        Raises:
            ConfigError: names what is in the way.
        """
        if self.architecture not in TRAINABLE:
            raise ConfigError(
                f"{self.where}: the architecture {self.architecture or 'that config.json does not name'} is "
                f"not one that the learner trains exactly; use one of {', '.join(TRAINABLE)}"
            )
        window = self.attention_window
        if window is not None and window < max_context_tokens:
            raise ConfigError(
                f"{self.where}: its layers see {window} tokens only, and the learner trains without such a "
                f"window; use model.max_context_tokens={window} or less, or another model"
            )


def read_folder(path: Path, where: str, *, weights: bool = True) -> ModelFolder:
    """Read `path`, a model folder; `weights=False` where only the small files have been downloaded.

    Raises:
        DataError: a file is missing, cut, of another format, or a Git LFS pointer.
    """
    config = _read_json(path / "config.json", where)
    if not any((path / name).is_file() for name in TOKENIZERS):
        raise DataError(
            f"{where}: no tokenizer in {path} (none of {', '.join(TOKENIZERS)}); copy the tokenizer's files "
            f"there"
        )
    shapes = _read_shapes(path, where) if weights else {}
    return ModelFolder(path=path, where=where, config=config, shapes=shapes)


def _read_json(path: Path, where: str) -> dict[str, object]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{where}: no {path.name} in {path.parent}; name a Hugging Face model folder"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: {path} cannot be read ({error}); restore the file") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: {path} holds no JSON object; restore the file")
    return value


def has_all_weights(folder: Path) -> bool:
    """Whether every weight file is there, as is not so in the midst of a download."""
    names = _weight_files(folder, str(folder))
    return bool(names) and all((folder / name).is_file() for name in names)


def _weight_files(folder: Path, where: str) -> list[str]:
    """Names of the files that hold the weights: those of the index, else the single one. Other files may lie
    beside them, such as Mistral's `consolidated.safetensors`, which holds the same again."""
    if (folder / INDEX).is_file():
        names = _read_json(folder / INDEX, where).get("weight_map")
        return sorted({str(name) for name in names.values()}) if isinstance(names, dict) else []
    if (folder / SINGLE).is_file():
        return [SINGLE]
    return sorted(file.name for file in folder.glob("*.safetensors"))


def _read_shapes(folder: Path, where: str) -> dict[str, list[int]]:
    files = [folder / name for name in _weight_files(folder, where)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise DataError(
            f"{where}: {folder / INDEX} names {missing[0]}, which is not in {folder} ({len(missing)} of "
            f"{len(files)} files are missing); download the model again"
        )
    if not files:
        other = sorted(file.name for file in folder.glob("*.bin"))
        found = f"weights only as {other[0]}" if other else "no weights"
        raise DataError(
            f"{where}: {found} in {folder}; save the model with save_pretrained, which writes *.safetensors"
        )
    shapes: dict[str, list[int]] = {}
    for file in files:
        shapes |= _read_header(file, where)
    return shapes


def _read_header(file: Path, where: str) -> dict[str, list[int]]:
    """Shapes by name from a safetensors file's head: eight bytes of length, then so many bytes of JSON."""
    try:
        size = file.stat().st_size
        opened = file.open("rb")
    except OSError as error:
        raise DataError(f"{where}: {file} cannot be read ({error.strerror}); restore the file") from error
    with opened:
        first = opened.read(8)
        if LFS_POINTER.startswith(first) and first:
            raise DataError(f"{where}: {file} is a Git LFS pointer, not weights; run git lfs pull there")
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > size - 8:
            raise DataError(f"{where}: {file} is no safetensors file, or is cut; download it again")
        head = opened.read(length)
    try:
        entries = {name: entry for name, entry in json.loads(head).items() if name != "__metadata__"}
        shapes = {name: [int(number) for number in entry["shape"]] for name, entry in entries.items()}
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(f"{where}: {file} has no safetensors header ({error}); download it again") from error
    if 8 + length + end != size:
        raise DataError(
            f"{where}: {file} has {size} bytes and its header speaks of {8 + length + end}; download it again"
        )
    return shapes
