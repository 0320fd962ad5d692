from pathlib import Path

import pytest

from memtune.storage.atomic import place_of, replace_files

NAMES = ["a.json", "b.bin", "c.md"]


def write(folder: Path, text: str) -> None:
    with replace_files(folder) as staging:
        for name in NAMES:
            (staging / name).write_text(text)


def read(folder: Path) -> set[str]:
    return {place_of(folder, name).read_text() for name in NAMES}


def test_files_are_replaced_and_others_left_alone(tmp_path):
    (tmp_path / "log.txt").write_text("mine")
    write(tmp_path, "old")
    write(tmp_path, "new")
    assert read(tmp_path) == {"new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*NAMES, "log.txt"])


def test_an_exception_leaves_the_old_files(tmp_path):
    write(tmp_path, "old")
    with pytest.raises(ZeroDivisionError), replace_files(tmp_path) as staging:
        (staging / "a.json").write_text(f"new {1 / 0}")
    assert read(tmp_path) == {"old"}
    assert sorted(path.name for path in tmp_path.iterdir()) == NAMES


@pytest.mark.parametrize("moved", range(len(NAMES) + 1))
def test_a_commit_counts_from_its_rename_on(tmp_path, monkeypatch, moved):
    """Stop while the files are being moved: the new ones are read, and the next save puts all in place."""
    write(tmp_path, "old")
    replace, calls = Path.replace, []

    def stop_after(path, target):
        if len(calls) == moved:
            raise KeyboardInterrupt
        calls.append(path)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", stop_after)
    if moved < len(NAMES):
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, "new")
    else:
        write(tmp_path, "new")
    assert read(tmp_path) == {"new"}
    monkeypatch.undo()
    write(tmp_path, "newer")
    assert read(tmp_path) == {"newer"}
    assert sorted(path.name for path in tmp_path.iterdir()) == NAMES
