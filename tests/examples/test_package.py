"""What the package asks of a machine, and what the README says of it."""

from __future__ import annotations

import ast
import re
from importlib.metadata import requires
from pathlib import Path

import torch
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
ROWS = re.findall(r"^\| (.*\".*) \| (`tests/.*`) \|$", (ROOT / "docs" / "reliability.md").read_text(), re.MULTILINE)


def words(text: str) -> str:
    """Without markup and line breaks."""
    return " ".join(re.sub(r"[*`\[\]]|\]\([^)]*\)", "", text).split())


def test_the_torch_that_is_installed_stays() -> None:
    """No requirement names a build, an upper bound or an index: pip leaves any torch that is new enough."""
    asked = {each.name: each for each in map(Requirement, requires("memtune") or []) if each.marker is None}
    assert {clause.operator for clause in asked["torch"].specifier} == {">="}
    assert asked["torch"].specifier.contains(torch.__version__, prereleases=True)
    assert asked["torch"].url is None
    assert "torchvision" not in asked


def test_what_the_readme_says_is_there() -> None:
    readme = words((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(ROWS) >= 10
    for statement, _ in ROWS:
        for quoted in re.findall(r'"([^"]+)"', statement):
            assert words(quoted) in readme


def test_each_statement_has_its_tests() -> None:
    for statement, tests in ROWS:
        for place in re.findall(r"`([^`]+)`", tests):
            path, name = place.split("::")
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert name in names, f"{statement}: {place}"
