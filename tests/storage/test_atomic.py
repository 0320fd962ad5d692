import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memtune.storage import atomic
from memtune.storage.atomic import current, replace_files

NAMES = ["a.json", "b.bin", "c.md"]

WRITER = """
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[2])  # the module alone, as it needs nothing of the package that takes seconds to import
from atomic import replace_files

folder = Path(sys.argv[1])
print("ready", flush=True)
for turn in range(1, 10**6):
    with replace_files(folder) as staging:
        for name in ("a.json", "b.bin", "c.md"):
            (staging / name).write_text(f"{turn} " * 2000)
"""


def write(folder: Path, text: str) -> None:
    with replace_files(folder) as staging:
        for name in NAMES:
            (staging / name).write_text(text)


def read(folder: Path) -> set[str]:
    return {current(folder, name).read_text() for name in NAMES}


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


@pytest.mark.slow
def test_a_killed_writer_never_leaves_a_mixture(tmp_path):
    """Kill a process that saves without a pause, at random moments; whatever it leaves is one save, whole."""
    pause = random.Random(0)
    write(tmp_path, "0 ")
    for _ in range(20):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(Path(atomic.__file__).parent)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            writer.stdout.readline()
            time.sleep(pause.uniform(0.01, 0.3))
            writer.send_signal(signal.SIGKILL)
        found = read(tmp_path)
        assert len(found) == 1
        turns = set(found.pop().split())
        assert len(turns) == 1
