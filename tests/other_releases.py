"""Other releases of libraries, in folders of their own that a process can put before those of the test environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def install(site: Path, *requirements: str) -> Path:
    """Let pip put packages, without what they depend on, into a folder; skip the test where pip cannot get them."""
    pytest.importorskip("pip")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--retries", "0", "--timeout", "20"]
    command = [*pip, "--no-deps", "--target", str(site), *requirements]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        pytest.skip(f"pip cannot get {' '.join(requirements)} here: {done.stderr.strip().splitlines()[-1]}")
    return site
