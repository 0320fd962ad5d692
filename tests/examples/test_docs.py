"""Every block of code in the documentation runs as it is printed, and every option that it names is there.

A tiny backbone has the name of a large one, on a Hub on this machine; the adapters, folders and images that the
documentation names are there as well (`docs_material`). Files are found by themselves: a new page needs nothing here
but what its code takes as given.
"""

from __future__ import annotations

import ast
import doctest
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import hub_server
import pytest
import torch
import transformers
from accelerate.commands.launch import launch_command_parser
from docs_material import make_material, names, publish
from hub_server import Hub

import memtune
from memtune.cli.parser import build_parser, main
from memtune.methods import registry

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *ROOT.glob("adapters/README.md")]
PIECES = ROOT / "docs" / "new_method.md"
"""The page whose blocks are pieces of an example, not code to run in turn."""

PACKAGES = {
    "explain": ["matplotlib"],
    "export": ["onnx", "onnxscript", "onnxruntime"],
    "sweep": ["optuna"],
    "timm": ["timm"],
}
"""What a page's code needs beside memtune's own dependencies."""

pytestmark = [
    # torch's own, when a program is exported (torch 2.13)
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:(onnx|torch)"),
    # peft's, where it asks the Hub for the configuration of a backbone that is in the cache
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
]


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the number of lines before its first, and its text."""

    language: str
    line: int
    text: str


def fenced(text: str) -> list[Block]:
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(each[1], text[: each.start(2)].count("\n"), each[2]) for each in found]


def python(page: Path) -> list[Block]:
    return [block for block in fenced(page.read_text()) if block.language == "python"]


def shell_lines(text: str) -> list[str]:
    """The lines of code that is not Python, in fences or indented; one that goes on after a backslash is one line."""
    blocks = [block.text for block in fenced(text) if block.language != "python"]
    blocks += re.findall(r"(?:^ {4}.+\n)+", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.M)
    return [line.strip() for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]


def memtune_lines(text: str) -> list[str]:
    return [line for line in shell_lines(text) if line.startswith("memtune ") and "..." not in line]


def each_page(pages: list[Path], **marks: pytest.MarkDecorator) -> pytest.MarkDecorator:
    """Run a test for every page.

    Args:
        pages: The pages.
        marks: Marks of some of them, by the name of the file or of its folder.
    """
    return pytest.mark.parametrize(
        "page",
        [
            pytest.param(page, marks=[marks[name] for name in (page.stem, page.parent.name) if name in marks])
            for page in pages
        ],
        ids=[str(page.relative_to(ROOT)) for page in pages],
    )


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    make_material(folder)
    return folder


@pytest.fixture
def desk(material: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, a copy of its own, with the Hub at hand, where the reader is `me`."""
    torch.set_num_threads(1)  # waiting for a second thread takes longer than all of a tiny model's arithmetic
    monkeypatch.setitem(hub_server.TOKENS, "writer", ("me", True))
    for folder in (material / "hub").glob("*/*"):
        publish(hub, str(folder.relative_to(material / "hub")), folder)
    shutil.copytree(material / "desk", tmp_path / "desk")
    monkeypatch.chdir(tmp_path / "desk")
    yield tmp_path / "desk"
    transformers.__dict__.pop("TFPreTrainedModel", None)  # which docs/predict.md sets


def test_every_block_is_found() -> None:
    for page in PAGES:
        assert len(python(page)) == page.read_text().count("```python")
    assert len(COMMANDS["README.md"]) == (ROOT / "README.md").read_text().count("\nmemtune ")
    assert len(COMMANDS[HELP]) == 7


@each_page(
    [page for page in PAGES if page != PIECES and python(page)],
    adapters=pytest.mark.shared,  # needs the real backbone
    continual=pytest.mark.slow,  # trains 200 epochs
    sweep=pytest.mark.slow,  # trains 660 epochs
)
@pytest.mark.slow
def test_python_runs(page: Path, desk: Path, request: pytest.FixtureRequest) -> None:
    """The blocks of a page in turn, with the same names; a traceback shows the page's own lines."""
    if missing := [name for name in PACKAGES.get(page.stem, []) if find_spec(name) is None]:
        pytest.skip(f"{page.name} needs {', '.join(missing)}")
    if page.parent.name == "adapters":
        (desk / "adapters").symlink_to(page.parent)
        real = request.getfixturevalue("shared_models") / "vit-tiny-patch16-224"
        publish(request.getfixturevalue("hub"), "WinKawaks/vit-tiny-patch16-224", real)
    width = re.search(r"nn\.Linear\((\d+),", page.read_text())
    namespace = names(int(width[1]) if width else None)
    for block in python(page):
        exec(compile("\n" * block.line + block.text, str(page), "exec"), namespace)


def _documented() -> dict[str, object]:
    """The public names that a docstring of their own explains, and those of the public modules."""
    from memtune.arithmetic import merge_adapters
    from memtune.export import export_program
    from memtune.hub import list_adapters

    named = {name: getattr(memtune, name) for name in memtune.__all__}
    own = {name: value for name, value in named.items() if callable(value) and name != "load"}
    return own | {"merge_adapters": merge_adapters, "export_program": export_program, "list_adapters": list_adapters}


@pytest.mark.parametrize("name", _documented())
def test_the_example_of_every_public_name(name: str, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    text = _documented()[name].__doc__ or ""
    examples = doctest.DocTestParser().get_doctest(text, names(None), name, None, None)
    assert examples.examples, f"{name} has no example"
    said: list[str] = []
    assert doctest.DocTestRunner().run(examples, out=said.append).failed == 0, "".join(said)


def test_pieces_are_those_of_the_example() -> None:
    """As they are printed, but for the docstrings, which the page's own words replace."""
    example = (ROOT / "examples" / "new_method.py").read_text()
    example = re.sub(r'^ +""".*"""\n', "", example, flags=re.MULTILINE)
    pieces = python(PIECES)
    assert len(pieces) == 3
    for piece in pieces:
        assert piece.text in example


HELP = "memtune --help"
COMMANDS = {str(page.relative_to(ROOT)): memtune_lines(page.read_text()) for page in PAGES}
COMMANDS[HELP] = re.findall(r"^  (memtune .+)$", build_parser().description or "", re.MULTILINE)


@pytest.mark.parametrize("place", [place for place, lines in COMMANDS.items() if lines])
@pytest.mark.slow
def test_the_command_line_runs(place: str, desk: Path) -> None:
    for line in COMMANDS[place]:
        words = [
            sorted(map(str, Path().glob(word))) if "*" in word else [word] for word in shlex.split(line, comments=True)
        ]
        assert all(words), f"nothing is named by a pattern of {line!r}"
        _, *arguments = [word for each in words for word in each]
        try:
            code = main(arguments)
        except SystemExit as end:  # by which --help ends
            code = end.code
        assert code == 0, line


# Programs that would take too long are asked for their options only.

_PROGRAMS = ("memtune ", "python examples/", "accelerate launch ")


def options_in(line: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", line))


def programs(text: str) -> list[tuple[str, set[str]]]:
    """Each program that a page names in code, with the options that it is given.

    A line without a program of its own that has options (`memory    --method memory`) belongs to the one before it.
    """
    spans = [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    found: list[tuple[str, set[str]]] = []
    for line in [span for span in spans if span.startswith(_PROGRAMS)] + shell_lines(text):
        options = options_in(line)
        if line.startswith("accelerate launch "):
            own, *rest = re.split(r" (examples/\S+\.py)", line)
            found.append(("accelerate launch", options_in(own)))
            if rest:
                found.append((rest[0], options_in(rest[1])))
        elif line.startswith(_PROGRAMS):
            words = line.removeprefix("python ").split()
            bare = next((place for place, word in enumerate(words) if not re.match(r"[\w/.]*\w$", word)), len(words))
            found.append((" ".join(words[:bare][: 2 if words[0] == "memtune" else None]), options))
        elif found and options:
            found[-1][1].update(options)
    return found


@cache
def example_helps() -> dict[str, str]:
    """What each example in the documentation prints with --help: as a program of its own, but in one process."""
    asked = {program for page in PAGES for program, _ in programs(page.read_text()) if program.startswith("examples/")}
    code = """if True:
        import pathlib, runpy, sys
        for program in sys.argv[1:]:
            name, *words = program.split()
            sys.argv, sys.path[0] = [name, *words, "--help"], str(pathlib.Path(name).parent)
            print("=== " + program, flush=True)
            try:
                runpy.run_path(name, run_name="__main__")
            except SystemExit as end:
                assert end.code == 0, program
    """
    done = subprocess.run(
        [sys.executable, "-c", code, *sorted(asked)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shown = re.split(r"^=== (.*)\n", done.stdout, flags=re.MULTILINE)[1:]
    return dict(zip(shown[::2], shown[1::2], strict=True))


def options_of(program: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    if program == "accelerate launch":
        return set(launch_command_parser()._option_string_actions)
    if program.startswith("memtune"):
        with pytest.raises(SystemExit):
            main([*program.split()[1:], "--help"])
        text = capsys.readouterr().out
    else:
        text = example_helps()[program]
    entries = re.findall(r"^  (-.*?)(?:  |$)", text, re.MULTILINE)
    return {option for entry in entries for option in re.findall(r"--[\w-]+", entry)}


@each_page([page for page in PAGES if programs(page.read_text())])
@pytest.mark.slow
def test_options_are_there(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for program, options in programs(page.read_text()):
        assert options <= options_of(program, capsys), program


def test_troubleshooting_names_errors_that_there_are() -> None:
    """Who searches the page for what an error says finds it: each message of several words is one of the package's."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "memtune").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    firsts = re.findall(r"^\| (.*?) \|", page, re.MULTILINE)
    messages = [each for first in firsts for each in re.findall(r"`([^`]+ [^`]+)`", first)]
    assert len(messages) > 20
    assert [each for each in messages if not any(each in text for text in texts)] == []
