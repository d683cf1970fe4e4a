"""What a model folder may lack, read as files: a refusal is one line with the folder and the way out."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from rlver_dist.errors import ConfigError, DataError
from rlver_dist.preflight.model_folder import has_all_weights, read_folder

CONFIG = {"architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 2, "max_position_embeddings": 4096}
WHERE = "model.path=mine"


@pytest.fixture
def folder(tmp_path):
    """A folder with all that is looked for, and one tensor of 2 x 3."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "tokenizer.json").write_text("{}")
    save_file({"a.weight": np.zeros((2, 3), np.float32)}, tmp_path / "model.safetensors")
    return tmp_path


def configured(folder, **changes):
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return read_folder(folder, WHERE)


def refused(folder, match):
    with pytest.raises(DataError, match=match) as caught:
        read_folder(folder, WHERE)
    assert str(caught.value).startswith(f"{WHERE}: ") and "\n" not in str(caught.value)


def test_a_whole_folder_is_read(folder):
    found = read_folder(folder, WHERE)
    assert found.shapes == {"a.weight": [2, 3]}
    assert (found.architecture, found.num_layers, found.longest_context) == ("Qwen2ForCausalLM", 2, 4096)
    found.check_trainable(4096)
    found.check_context("model.max_context_tokens", 4096)
    with pytest.raises(ConfigError, match=r"^model.max_context_tokens=4097: model.path=mine has .* 4096 tok"):
        found.check_context("model.max_context_tokens", 4097)


def test_a_missing_or_broken_configuration_is_named(folder):
    (folder / "config.json").write_text("{")
    refused(folder, "config.json cannot be read")
    (folder / "config.json").write_text("[1]")
    refused(folder, "config.json holds no JSON object")
    (folder / "config.json").unlink()
    refused(folder, "no config.json in")


def test_a_missing_tokenizer_is_named(folder):
    (folder / "tokenizer.json").unlink()
    refused(folder, "no tokenizer in")


def test_weights_of_another_kind_or_none_are_named(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "weights only as pytorch_model.bin in .*; save the model with save_pretrained")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "no weights in")


def test_a_git_lfs_pointer_is_named(folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 988097824\n"
    (folder / "model.safetensors").write_text(pointer)
    refused(folder, "model.safetensors is a Git LFS pointer, not weights; run git lfs pull")


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_a_cut_file_is_named(folder, kept):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:kept])
    refused(folder, "model.safetensors .*; download it again")


@pytest.mark.parametrize(
    "head", [b"not JSON", b"[1]", b'{"a": 3}', b'{"a": {"shape": [1]}}', b'{"a": {"shape": ["x"]}}']
)
def test_a_header_that_is_none_is_named(folder, head):
    (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)
    refused(folder, "model.safetensors has no safetensors header")


def test_a_missing_shard_is_named(folder):
    index = {"weight_map": {"a.weight": "model.safetensors", "b.weight": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, r"names model-2.safetensors, which is not in .* \(1 of 2 files are missing\)")
    shutil.copy(folder / "model.safetensors", folder / "model-2.safetensors")
    read_folder(folder, WHERE)


def test_a_second_copy_of_the_weights_does_not_count(folder):
    save_file({"a.weight": np.zeros((9, 9), np.float32)}, folder / "consolidated.safetensors")
    assert read_folder(folder, WHERE).shapes == {"a.weight": [2, 3]}


def test_a_download_in_its_midst_is_told_from_a_whole_one(folder):
    assert has_all_weights(folder)
    index = {"weight_map": {"a.weight": "model.safetensors", "b.weight": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not has_all_weights(folder)


def test_weights_are_left_out_where_only_small_files_were_downloaded(folder):
    (folder / "model.safetensors").unlink()
    assert read_folder(folder, WHERE, weights=False).shapes == {}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "the architecture Qwen3MoeForCausalLM is not one that"),
        (
            {"architectures": ["Qwen2_5_VLForConditionalGeneration"]},
            "Qwen2_5_VLForConditionalGeneration is not",
        ),
        ({"architectures": None}, "the architecture that config.json does not name"),
        (
            {"use_sliding_window": True, "sliding_window": 1024},
            "see 1024 tokens only.*max_context_tokens=1024",
        ),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 512}, "see 512 tokens only"),
    ],
)
def test_models_that_would_be_trained_otherwise_than_sampled_are_refused(folder, changes, reason):
    with pytest.raises(ConfigError, match=reason):
        configured(folder, **changes).check_trainable(2048)


def test_windows_that_no_dialogue_reaches_or_that_are_off_pass(folder):
    configured(folder, use_sliding_window=False, sliding_window=1024).check_trainable(2048)
    configured(folder, sliding_window=1024).check_trainable(2048)
    configured(folder, use_sliding_window=True, sliding_window=2048).check_trainable(2048)
    configured(folder, architectures=["MistralForCausalLM"], sliding_window=None).check_trainable(8192)
    configured(folder, architectures=["MistralForCausalLM"]).check_trainable(4096)


@pytest.mark.parametrize(
    ("rope", "reach"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 8192),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4}}, 16384),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, 4096),
        ({"rope_scaling": None}, 4096),
    ],
)
def test_positions_reach_as_far_as_the_engines_have_them(folder, rope, reach):
    assert configured(folder, **rope).longest_context == reach


def test_a_wrapper_without_layers_of_its_own_is_refused_by_name(folder):
    (folder / "config.json").write_text(json.dumps({"architectures": ["X"], "text_config": CONFIG}))
    with pytest.raises(DataError, match=r"num_hidden_layers=None in .*config.json is no number of layers"):
        _ = read_folder(folder, WHERE).num_layers


def test_reading_a_folder_imports_no_torch(folder):
    program = (
        "import sys; from pathlib import Path; from rlver_dist.preflight.model_folder import read_folder; "
        f"read_folder(Path({str(folder)!r}), 'x'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
