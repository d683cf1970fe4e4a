"""docs/configuration.md says what the dataclasses of the configuration say."""

from collections.abc import Iterator
from dataclasses import asdict

from rlver_dist.config.run import RunConfig
from scripts.configuration_page import GROUPS, PAGE, render


def keys(options: dict, prefix: str = "") -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_the_committed_page_is_what_the_script_writes():
    assert PAGE.read_text(encoding="utf-8") == render(), "run python -m scripts.configuration_page"


def test_every_option_has_a_row_with_a_meaning():
    rows = [line.split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:3] == "| `"]
    meanings = {row[0].strip("| `"): row[-1].strip("| ") for row in rows}
    assert sorted(meanings) == sorted(keys(asdict(RunConfig())))
    assert all(meanings.values())


def test_every_group_stands_in_the_index():
    groups = [name for name, value in asdict(RunConfig()).items() if isinstance(value, dict)]
    assert list(GROUPS) == ["top-level", *groups]
