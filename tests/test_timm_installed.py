"""`test_timm.py` where timm is not installed: in a process that has it, the rest of the environment as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from other_releases import install

TESTS = Path(__file__).parent

TIMM = "timm==1.0.31"
TORCHVISION = "torchvision==0.28.0"
"""A release for torch 2.13; of another torch its Python files do as well."""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("timm") is not None, reason="timm is installed: test_timm.py has run by itself")
def test_on_timm(tmp_path: Path) -> None:
    site = install(tmp_path / "site", TIMM)
    if find_spec("torchvision") is None:
        install(site, TORCHVISION)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (site, TESTS)))}
    options = ["-p", "torchvision_operators", "-p", "no:cacheprovider", "-q", "--basetemp", str(tmp_path / "inner")]
    files = [str(TESTS / name) for name in ("test_timm.py", "test_docs.py")]  # of this the page docs/timm.md
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files, "-k", "test_timm or timm.md"],
        capture_output=True,
        text=True,
        timeout=1800,
        cwd=TESTS.parent,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
