"""The notebooks run from their first cell to their last, and what they show is what they have stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

NOTEBOOKS = Path(__file__).parents[2] / "examples" / "notebooks"
NOTEBOOK = NOTEBOOKS / "two_tasks_one_pass.ipynb"


def kinds(notebook: Any) -> list[list[str]]:
    """Of each cell what kinds of output it has."""
    return [[each.output_type for each in cell.get("outputs", [])] for cell in notebook.cells]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of jupyter's own libraries
def test_two_tasks_one_pass() -> None:
    stored = nbformat.read(NOTEBOOK, 4)
    notebook = nbformat.read(NOTEBOOK, 4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("scans(1000)", "scans(200)").replace("epochs=10", "epochs=2")
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources={})
    client.resources["metadata"] = {"path": str(NOTEBOOKS)}
    client.execute()
    assert kinds(notebook) == kinds(stored)
    assert not [path for path in NOTEBOOKS.iterdir() if path.suffix != ".ipynb"]  # it leaves nothing behind


def test_what_is_stored_names_no_folder_of_a_machine() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not [place for place in ("/home/", "/root/", "/tmp/", "/work/", "site-packages") if place in text]
