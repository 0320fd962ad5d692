"""What needs timm or torchvision, where they are not installed: in a process that has them, all else as it is here."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from other_releases import install

TESTS = Path(__file__).parents[1]

PACKAGES = {
    "timm": "timm==1.0.31",
    "torchvision": "torchvision==0.28.0",  # for torch 2.13; with another torch its Python files do as well
}
MISSING = [requirement for name, requirement in PACKAGES.items() if find_spec(name) is None]

RUN = {
    "backbones/test_timm.py": "test_timm",
    "data/test_augmentation.py": "test_augmentation",
    "examples/test_docs.py": "timm.md",  # of this the page docs/timm.md
}
"""Files of tests, and what chooses some of theirs by name."""


@pytest.mark.slow
@pytest.mark.skipif(not MISSING, reason="both are installed: these tests have run by themselves")
def test_with_timm_and_torchvision(tmp_path: Path) -> None:
    site = install(tmp_path / "site", *MISSING)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (site, TESTS)))}
    options = ["-p", "torchvision_operators", "-p", "no:cacheprovider", "-q", "--basetemp", str(tmp_path / "inner")]
    files = [str(TESTS / name) for name in RUN]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files, "-k", " or ".join(RUN.values())],
        capture_output=True,
        text=True,
        timeout=1800,
        cwd=TESTS.parent,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
