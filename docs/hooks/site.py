"""What the site has beside the files of its folder: pages that stand elsewhere, and links that lead elsewhere.

README.md is the first page, CHANGELOG.md and CONTRIBUTING.md are pages as well, and reference.md is made of the names
in `memtune.__all__`, which are read, not imported: so the site needs no torch.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that stand elsewhere."""
    for source, target in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, target, content=relocate(text, "", config)))
    files.append(File.generated(config, "reference.md", content=reference()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let links that lead out of the folder lead somewhere."""
    place = page.file.src_uri
    return markdown if place in PAGES.values() else relocate(markdown, f"docs/{posixpath.dirname(place)}", config)


def relocate(text: str, folder: str, config: Any) -> str:
    """A page's text with its links as they are in the site.

    Args:
        text: The text.
        folder: The folder of the checkout that it stands in; README.md's pages go into docs.
        config: That of mkdocs: links to files that are no pages lead to its `repo_url`, or nowhere if there is none.
    """

    def replace(match: re.Match[str]) -> str:
        picture, name, target, anchor = match[1], match[2], match[3], match[4] or ""
        if "://" in target:
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        if path in PAGES:
            page = posixpath.relpath(f"docs/{PAGES[path]}", folder or "docs")
            return f"{picture}[{name}]({page}{anchor})"
        if path.startswith("docs/") and (ROOT / path).is_file():
            return f"{picture}[{name}]({posixpath.relpath(path, folder or 'docs')}{anchor})"
        return f"[{name}]({config.repo_url}/blob/main/{path})" if config.repo_url else name

    return _LINK.sub(replace, text)


def reference() -> str:
    """The page of all public names."""
    tree = ast.parse((ROOT / "memtune" / "__init__.py").read_text(encoding="utf-8"))
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id in ("_NAMES", "__all__")
    }
    of_rooms = {name for names in values["_NAMES"].values() for name in names}
    lines = ["# Reference", "", "Everything public; what else the package has may change at any time.", ""]
    lines += ["## memtune", ""] + [f"::: memtune.{name}\n" for name in values["__all__"] if name in of_rooms]
    for name in values["__all__"]:
        if (ROOT / "memtune" / f"{name}.py").is_file() or (ROOT / "memtune" / name).is_dir():
            lines += [f"## memtune.{name}", ""] + [f"::: memtune.{name}.{each}\n" for each in public(name)]
    return "\n".join(lines)


def public(module: str) -> list[str]:
    """The names that a public module hands on."""
    path = ROOT / "memtune" / module
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    found += [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return sorted(name for name in found if not name.startswith("_") and name not in ("annotations", "Any"))
