"""The notebooks run from their first cell to their last, and what they show is what they have stored."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

NOTEBOOKS = Path(__file__).parents[2] / "examples" / "notebooks"
NOTEBOOK = NOTEBOOKS / "two_tasks_one_pass.ipynb"


def kinds(notebook: Any) -> list[list[str]]:
    """Of each cell what kinds of output it has."""
    return [[each.output_type for each in cell.get("outputs", [])] for cell in notebook.cells]


EXECUTE = """
import sys
import nbclient
import nbformat

path, folder = sys.argv[1:]
notebook = nbformat.read(path, 4)
resources = {"metadata": {"path": folder}}
nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
nbformat.write(notebook, path)
"""


@pytest.mark.slow
def test_two_tasks_one_pass(tmp_path: Path) -> None:
    """In a process of its own, as its event loops are never closed."""
    stored = nbformat.read(NOTEBOOK, 4)
    notebook = nbformat.read(NOTEBOOK, 4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("scans(1000)", "scans(200)").replace("epochs=10", "epochs=2")
        if cell.cell_type == "code":
            cell.outputs = []
    nbformat.write(notebook, tmp_path / NOTEBOOK.name)
    command = [sys.executable, "-c", EXECUTE, str(tmp_path / NOTEBOOK.name), str(NOTEBOOKS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert kinds(nbformat.read(tmp_path / NOTEBOOK.name, 4)) == kinds(stored)
    assert not [path for path in NOTEBOOKS.iterdir() if path.suffix != ".ipynb"]  # it leaves nothing behind


def test_what_is_stored_names_no_folder_of_a_machine() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not [place for place in ("/home/", "/root/", "/tmp/", "/work/", "site-packages") if place in text]
