"""The trials of `make fuzz` and `make soak`, a few of each; in processes of their own, which they kill and watch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TRIALS = Path(__file__).parent

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")]


def run(*command: str) -> str:
    """Run one of the programs, which must end well; what it printed."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=TRIALS, timeout=550)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_a_thousand_changed_folders() -> None:
    assert "1,000 inputs" in run("fuzz.py", "--inputs", "1000", "--workers", "1")


def test_kills_readers_and_threads() -> None:
    out = run("soak.py", "--kills", "15", "--reads", "300", "--answers", "600", "--threads", "8")
    assert out.count("none wrong") == 5


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs the right to mount a small disk")
def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    program = (
        "import sys; from pathlib import Path; import soak, memtune\n"
        "folder = Path(sys.argv[1])\n"
        "small = soak.tuned(0.0)\n"
        "large = memtune.wrap(soak.MODEL, memtune.MemoryConfig(5000), num_labels=1, masked=True)\n"
        "small.save_pretrained(folder / 'a')\n"
        "for save in (lambda: large.save_pretrained(folder / 'a'),\n"
        "             lambda: memtune.combine(soak.MODEL, {'x': large}).save_pretrained(folder / 'b')):\n"
        "    try:\n        save()\n"
        "    except memtune.MemtuneError as error:\n        print('refused:', error)\n"
        "soak.read_alone(folder / 'a')\n"
        "assert not list(folder.rglob('.memtune*'))\n"
    )
    try:
        assert run("-c", program, str(tmp_path)).count("refused: ") == 2
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
