"""What a wheel holds: configuration, bank and material, found from any directory."""

import itertools
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "conf" / "exp").glob("*.yaml"))
PLACEMENTS = sorted(path.stem for path in (ROOT / "conf" / "on").glob("*.yaml"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the unpacked wheel, built from a copy so that the checkout stays clean."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    names = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "conf", "rlver_dist"]
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in names), str(source)], check=True)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(source / "out"),
        str(source),
    ]
    subprocess.run(build, check=True, capture_output=True, timeout=120)
    with zipfile.ZipFile(next((source / "out").glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    return folder


def run(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run the wheel's code, not the checkout's, in `cwd`."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_wheels_own_files_are_used(installed, tmp_path):
    done = run(installed, tmp_path, "-c", "import rlver_dist.launch as l; print(l.CONFIG_DIR)")
    assert done.stdout.strip() == str(installed / "rlver_dist" / "conf"), done.stderr


@pytest.mark.parametrize(("recipe", "placement"), itertools.product(RECIPES, PLACEMENTS))
def test_every_pair_composes_from_a_wheel_in_an_empty_directory(installed, tmp_path, recipe, placement):
    done = run(
        installed, tmp_path, "-m", "rlver_dist.launch", f"+on={placement}", f"+exp={recipe}", "check=true"
    )
    assert done.returncode == 0, done.stderr
    assert "240 training" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_wheel_holds_the_users_material(installed):
    material = (
        "simulator/messages_en.yaml simulator/rules/heads.safetensors data/people.yaml "
        "data/bank/train.jsonl persona_synthesis/seeds.yaml"
    )
    for name in material.split():
        assert (installed / "rlver_dist" / name).stat().st_size > 0
    assert len(list((installed / "rlver_dist" / "data" / "seeds").glob("*.yaml"))) == 16


def test_entry_points_are_declared(installed):
    text = next(installed.glob("*.dist-info/entry_points.txt")).read_text()
    assert "rlver-dist = rlver_dist.launch:main" in text
    assert "rlver_dist = rlver_dist.rollout.weight_transfer:register" in text
