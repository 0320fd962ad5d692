"""The tower: no circle of imports, few files at its foot, and no function that hides a module."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

import memtune

ROOT = Path(memtune.__file__).parent


def _imports() -> dict[str, set[str]]:
    """For each module of the package the modules that it imports, also for type checking alone."""
    names = {".".join(("memtune", *path.relative_to(ROOT).with_suffix("").parts)): path for path in ROOT.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for name, path in names.items():
        package = name.removesuffix(".__init__") if path.name == "__init__.py" else name.rpartition(".")[0]
        targets = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], node.module or ""])
                inside = [f"{base.strip('.')}.{alias.name}" for alias in node.names]
                modules = {each for target in inside for each in (target, f"{target}.__init__") if each in names}
                targets |= modules or {base.strip(".")}
        found[name] = {target if target in names else f"{target}.__init__" for target in targets}
    return found


def test_no_circle_of_imports() -> None:
    imports, done, path = _imports(), set(), []

    def visit(name: str) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for target in sorted(imports[name]):
            visit(target)
        path.pop()
        done.add(name)

    for name in imports:
        visit(name)
    assert len(done) > 60


def test_few_files_lie_outside_of_rooms() -> None:
    assert len(list(ROOT.glob("*.py"))) <= 12


def test_no_function_hides_a_module() -> None:
    packages = ["memtune", *(f"memtune.{each.name}" for each in pkgutil.iter_modules([str(ROOT)]) if each.ispkg)]
    for name in packages:
        package = importlib.import_module(name)
        for each in pkgutil.iter_modules(package.__path__):
            assert isinstance(getattr(package, each.name, package), ModuleType), f"{name}.{each.name}"
