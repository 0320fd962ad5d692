"""The benchmarks of many tasks run, on models too small to mean anything, and print whole tables."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
SMALL = ["--quick", "--size", "tiny", "--image_size", "32", "--repeats", "2", "--threads", "1"]

pytestmark = pytest.mark.slow


def tables(name: str, *arguments: str) -> dict[tuple[str, str], list[str]]:
    """The rows that a benchmark prints, by the table's title and the row's name."""
    command = [sys.executable, str(BENCHMARKS / name), *SMALL, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows, title = {}, ""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    for line, following in zip(lines, [*lines[1:], []], strict=True):
        if following and following[0] == "---":
            title = line[0]
        elif line and line[0] != "---":
            assert len(line) == len(lines[lines.index(line) - 1])
            rows[title, " ".join(line[:2]) if "image" in title else line[0]] = line[1:]
    return rows


def numbers(cells: list[str]) -> list[float]:
    return [float(re.sub(r" (MB|kB|s|ms)$", "", cell)) for cell in cells]


def test_combine() -> None:
    rows = tables("combine.py", "--batch_size", "2")
    every, mixed = "every task for 2 images", "8 images, each with its own task"
    kinds = ["memory", "LoRA", "memory and LoRA", "memory and side network"]
    expected = [(every, f"memtune, masked {kind} {number}") for kind in kinds for number in (1, 4)]
    places = [f"{where}{base}" for where in ("all blocks", "last two blocks") for base in ("", ", `base=False`")]
    expected += [(every, f"memtune, unmasked LoRA, {where} 4") for where in places]
    expected += [(every, f"PEFT LoRA, `{how} 4") for how in ("adapter_names`", "set_adapter` in turn")]
    expected += [(mixed, f"memtune, masked {kind} 8") for kind in kinds]
    expected += [(mixed, "memtune, unmasked LoRA, all blocks 8"), (mixed, "PEFT LoRA, `adapter_names` 8")]
    assert list(rows) == expected
    for cells in rows.values():
        *measured, pairs = numbers(cells[1:])
        assert all(value > 0 for value in measured)
        assert pairs == 2
    in_turn = next(row for row in expected if "set_adapter" in row[1])
    assert numbers(rows[in_turn])[2] > 2  # four passes take longer than one, on the busiest machine


def test_many_adapters() -> None:
    rows = tables("many_adapters.py")
    sizes = {name: numbers(cells) for (title, name), cells in rows.items() if title == "measure"}
    assert list(sizes) == ["trained values", "on disk", "resident memory", "time to load"]
    for name, (together, one) in sizes.items():
        assert one == pytest.approx(together * 1000 / 20, rel=0.2), name  # the time of 20 is printed in hundredths
    assert sizes["trained values"][1] == pytest.approx(4 * (12 * 4 * 192 + 192 + 192 * 10 + 10) / 1000, abs=0.1)
    passes = {name: numbers(cells) for (title, name), cells in rows.items() if title == "pass"}
    assert list(passes) == [
        "one image, one task",
        "one image, all tasks",
        "8 images, one task",
        "8 images, each with its own task",
    ]
    assert all(value > 0 for values in passes.values() for value in values)


def test_memory() -> None:
    kinds = ["forward", "head", "masked", "unmasked", "unmasked_tokentune", "lora"]
    rows = tables("memory.py", "--image_size", "64", "--batch_size", "8", "--selected", "3", "--kinds", *kinds)
    names = [name for _, name in rows]
    assert {title for title, _ in rows} == {"ViT-Tiny/16, training step"}
    assert names[:4] == ["forward pass of the frozen backbone", "head only", "masked memory", "unmasked memory"]
    assert names[4:] == ["unmasked memory, TokenTune", "PEFT LoRA"]
    measured = dict(zip(kinds, map(numbers, rows.values()), strict=True))
    reference, _, _ = measured["lora"]
    for megabytes, ratio, _ in measured.values():
        assert ratio == pytest.approx(megabytes / reference, abs=0.6 / reference * (1 + ratio) + 0.001)
    kept = {kind: values[2] for kind, values in measured.items()}
    assert kept["forward"] == 0
    assert kept["head"] < kept["masked"] < kept["unmasked_tokentune"] < 0.6 * kept["unmasked"]
    assert kept["unmasked"] < kept["lora"]


def test_serving() -> None:
    pytest.importorskip("uvicorn")
    command = [sys.executable, str(BENCHMARKS / "serving.py"), "--size", "tiny", "--image_size", "32", "--rounds", "1"]
    command += ["--adapters", "1", "3", "--requests", "8", "--clients", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[3:]]
    assert [row[0] for row in rows] == ["1", "3"]
    assert all(float(cell) > 0 for row in rows for cell in row[1:])


def test_gpu(tmp_path: Path) -> None:
    """On a CPU, that it runs and goes on; its figures are for GPUs."""
    script = str(BENCHMARKS / "gpu.py")
    command = [sys.executable, script, "--output_dir", str(tmp_path), "--device", "cpu", "--quick", "--seconds"]
    for seconds in ("0", "300", "300"):  # nothing, all, and nothing again
        done = subprocess.run([*command, seconds], capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        path = tmp_path / "results.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        assert len(found) == (0 if seconds == "0" else 14)
    assert not [each["problem"] for each in found if "problem" in each]
    assert all(each["ms"] > 0 for each in found)
    assert (tmp_path / "tables.md").read_text().count("cached step") == 4


MOST_LAUNCHES = {
    "1 of memory": 3.0,
    "16 of memory": 3.6,
    "1 of memory and LoRA": 4.95,
    "16 of memory and side network": 5.9,
    "16 of side network, pooled": 2.3,
}
"""Kernels of a pass over those of the bare backbone's: what they are today, so that they do not grow unseen."""


def test_launches() -> None:
    command = [sys.executable, str(BENCHMARKS / "launches.py"), "--image_size", "32", "--batch_size", "4"]
    done = subprocess.run([*command, "--tasks", "1", "16"], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {
        cells[0]: [float(cell) for cell in cells[1:]]
        for line in done.stdout.splitlines()[4:]
        if (cells := [cell.strip() for cell in line.split("|")[1:-1]])
    }
    assert rows["the bare backbone"][:2] == [149, 1]
    for name, most in MOST_LAUNCHES.items():
        assert 1 < rows[name][1] <= most, name
    assert rows["16 of memory"][1] < rows["1 of memory"][1] * 1.3  # a block has no loop over tasks
    assert all(values[3] > 0.01 for values in rows.values())
