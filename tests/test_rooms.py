"""The tower: no circle of imports, few files at its foot, and no function that hides a module."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import memtune
from memtune.moved import MOVED

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


def test_public_names_are_those_that_are_written_down_twice() -> None:
    """Once for type checkers, once for `memtune.__getattr__`."""
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    written = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert written - {"import_module", "find_spec", "MovedModules", "TYPE_CHECKING", "Any"} == set(memtune.__all__)
    assert all(getattr(memtune, name) is not None for name in memtune.__all__)
    assert set(memtune.__all__) <= set(dir(memtune))
    assert isinstance(memtune.errors, ModuleType)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = memtune.nothing


@pytest.mark.parametrize("arguments", ["--help", "--version", "inspect --help", "no-command", "predict --no-option x"])
def test_the_command_line_answers_without_torch(arguments: str) -> None:
    program = (
        "import sys\nfrom memtune.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, *arguments.split()], check=True, capture_output=True)


def test_modules_are_found_by_the_names_that_they_had_before_there_were_rooms() -> None:
    modules = {".".join(("memtune", *path.relative_to(ROOT).with_suffix("").parts)) for path in ROOT.rglob("*.py")}
    for old, new in MOVED.items():
        assert f"memtune.{old}" not in modules
        assert f"memtune.{old}.__init__" not in modules
        sys.modules.pop(f"memtune.{old}", None)
        with pytest.warns(FutureWarning, match=rf"memtune\.{old} is memtune\.{new} now"):
            found = importlib.import_module(f"memtune.{old}")
        assert found is importlib.import_module(f"memtune.{new}")
        assert found.__spec__ is not None
        assert found.__spec__.name == f"memtune.{new}"


def test_a_name_that_no_module_ever_had_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"memtune\.nothing"):
        importlib.import_module("memtune.nothing")
    with pytest.raises(ModuleNotFoundError, match=r"memtune\.tasks\.checkpoint"):
        importlib.import_module("memtune.tasks.checkpoint")
