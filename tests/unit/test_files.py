"""Files and folders are complete or absent, and a failed write leaves the old one."""

from pathlib import Path

import pytest

from rlver_dist.files import new_folder, whole_file, whole_folder, write_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_at_the_end_or_stays(tmp_path):
    path = tmp_path / "a.txt"
    write_whole(path, "old\n")
    with whole_file(path) as aside:
        aside.write_text("new")
        assert path.read_bytes() == b"old\n"
    assert path.read_text() == "new"
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "\ud800")
    assert path.read_text() == "new" and names(tmp_path) == ["a.txt"]


def test_a_folder_is_replaced_as_a_whole_or_stays(tmp_path):
    path = tmp_path / "run" / "policy"
    for name in ("old", "new"):
        # What a killed write left.
        (tmp_path / "run" / "policy.tmp").mkdir(parents=True)
        (tmp_path / "run" / "policy.tmp" / "half").touch()
        with whole_folder(path) as aside:
            (aside / name).touch()
        assert names(path) == [name]
    with pytest.raises(OSError, match="disk"), whole_folder(path) as aside:
        (aside / "half").touch()
        raise OSError("disk is full")
    assert names(path) == ["new"] and names(path.parent) == ["policy"]


def test_of_several_builders_of_a_new_folder_the_first_to_finish_wins(tmp_path):
    path = tmp_path / "cache" / "model"
    with pytest.raises(OSError, match="not empty"), new_folder(path) as slow:
        with new_folder(path) as fast:
            (fast / "fast").touch()
        (slow / "slow").touch()
    assert names(path) == ["fast"] and names(path.parent) == ["model"]
