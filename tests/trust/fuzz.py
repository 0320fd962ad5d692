"""Changed folders and files through everything that reads them: `make fuzz`, and a thousand of them in the tests.

    python tests/trust/fuzz.py --inputs 100000 --workers 2 --seed 0
    python tests/trust/fuzz.py --kind adapters --only 4711      one input again, with what came of it

An input is a copy of an artefact, changed by a seed, and is given to one entry point. What may come of it is success or
a MemtuneError, within five seconds and 300 MB; no code may run, nothing may be written elsewhere, nor read through a
link.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
sys.path.insert(0, str(Path(__file__).parent))

import torch
from harness import (
    ADAPTERS,
    PIXELS,
    Watch,
    backbone,
    change,
    change_bytes,
    items,
    learn,
    make_artefacts,
    run_settings,
    search,
    train_from_cache,
)

import memtune
from memtune import MemoryConfig
from memtune.cli import main as memtune_command
from memtune.errors import CheckpointError, ConfigError
from memtune.peft_format import import_peft
from memtune.storage import decode
from memtune.training.checkpoint import _digests

if TYPE_CHECKING:
    from memtune.models import SharedModel

MODEL = backbone()
IMAGES = torch.randn(1, 3, PIXELS, PIXELS)


def answer(model: SharedModel) -> None:
    """Ask a model, and give the backbone back."""
    try:
        with torch.no_grad():
            model(IMAGES)
    finally:
        model.detach()


def load_adapter(place: Path, luck: random.Random) -> None:
    """An adapter alone."""
    answer(memtune.load(place, backbone=MODEL))


def combine_adapter(place: Path, luck: random.Random) -> None:
    """An adapter beside another one."""
    answer(memtune.combine(MODEL, {"one": place, "other": ARTEFACTS / "memory"}))


def inspect_adapter(place: Path, luck: random.Random) -> None:
    """An adapter in the command line, which answers in words, whatever it is."""
    code = memtune_command(["inspect", str(place), *["--json"] * luck.randrange(2)])
    assert code in (0, 1, 2), code


def save_over(place: Path, luck: random.Random) -> None:
    """A save into a folder in which something else is."""
    tuned = memtune.wrap(MODEL, MemoryConfig(1), labels=["a"], masked=True)
    try:
        tuned.save_pretrained(place)
    finally:
        tuned.detach()


def load_collection(place: Path, luck: random.Random) -> None:
    """A model of many tasks."""
    answer(memtune.MultiTaskModel.from_pretrained(place, MODEL))


def save_collection_over(place: Path, luck: random.Random) -> None:
    """A model of many tasks saved where another one is."""
    both = memtune.combine(MODEL, {"new": ARTEFACTS / "memory"})
    try:
        both.save_pretrained(place)
    finally:
        both.detach()


def read_peft(place: Path, luck: random.Random) -> None:
    """A folder of PEFT's."""
    answer(import_peft(place, MODEL))


def read_images(place: Path, luck: random.Random) -> None:
    """Pictures, each of which can be read or not."""
    for path in sorted(place.iterdir()):
        with contextlib.suppress(memtune.MemtuneError):
            decode(path)


def resume(place: Path, luck: random.Random) -> None:
    """A training run, which may not be changed by a checkpoint that is refused, nor the backbone by any."""
    tuned = memtune.wrap(MODEL, MemoryConfig(2), num_labels=2, masked=True)
    before = {key: tensor.clone() for key, tensor in tuned.task.tensors().items()}
    weights = {key: tensor.clone() for key, tensor in MODEL.state_dict().items()}
    try:
        memtune.fit(tuned, items(), None, run_settings(place), resume_from_checkpoint=place / "checkpoint-1")
    except (CheckpointError, ConfigError):  # and not that it has diverged, with the values that it began with
        assert all(torch.equal(tensor, before[key]) for key, tensor in tuned.task.tensors().items())
        raise
    finally:
        tuned.detach()
        assert all(torch.equal(tensor, weights[key]) for key, tensor in MODEL.state_dict().items())


def read_cache(place: Path, luck: random.Random) -> None:
    """A trunk cache, which may cost time, but never change what is trained from it."""
    found = train_from_cache(MODEL, place)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected_of_cache().items())


@cache
def expected_of_cache() -> dict[str, torch.Tensor]:
    """What training gives from a cache that nobody has touched."""
    with tempfile.TemporaryDirectory() as folder:
        return train_from_cache(MODEL, Path(folder))


def go_on_searching(place: Path, luck: random.Random) -> None:
    """A search."""
    search(MODEL, place)


def go_on_learning(place: Path, luck: random.Random) -> None:
    """A class-incremental run."""
    learn(MODEL, place)


def change_run(place: Path, luck: random.Random) -> None:
    """A checkpoint that a stranger has changed, with digests that fit what there is now."""
    change(place / "checkpoint-1", luck)
    path = place / "checkpoint-1" / "run.json"
    with contextlib.suppress(ValueError, OSError, TypeError, RecursionError):
        if not path.is_symlink() and path.is_file():
            files = {"files": _digests(path.parent)}
            path.write_text(json.dumps(json.loads(path.read_text()) | files))


def change_images(place: Path, luck: random.Random) -> None:
    """Every picture, each in another way."""
    for path in sorted(place.iterdir()):
        change_bytes(path, luck)


Action = Callable[[Path, random.Random], None]
KINDS: dict[str, tuple[float, list[str], Action, list[Action]]] = {
    "adapters": (0.55, [*ADAPTERS], change, [load_adapter] * 6 + [combine_adapter, inspect_adapter, save_over]),
    "collections": (0.12, ["all"], change, [load_collection] * 3 + [save_collection_over]),
    "peft": (0.1, ["peft"], change, [read_peft]),
    "images": (0.13, ["images"], change_images, [read_images]),
    "runs": (0.05, ["run"], change_run, [resume]),
    "caches": (0.03, ["cache"], change, [read_cache]),
    "searches": (0.01, ["search"], change, [go_on_searching]),
    "continual": (0.01, ["continual"], change, [go_on_learning]),
}
"""For each kind its share of the inputs, the artefacts, what changes them, and what reads them."""

ARTEFACTS = Path()
"""Where the artefacts are; set once for a process."""


def prepare(artefacts: Path) -> None:
    """Set a process up: quiet, and with all that is imported and allocated once."""
    global ARTEFACTS
    ARTEFACTS = artefacts
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)


def try_input(kind: str, seed: int, desk: Path, watch: Watch) -> Any:
    """Make one input and give it to its entry point."""
    luck = random.Random(f"{kind} {seed}")
    _, names, spoil, readers = KINDS[kind]
    place = desk / "input"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(ARTEFACTS / luck.choice(names), place)
    spoil(place, luck)
    watch.most = 1000.0 if kind == "images" else 300.0  # a picture of Pillow's largest size takes as much
    return watch.call(partial(luck.choice(readers), place, luck))


def work(artefacts: Path, seeds: list[tuple[str, int]]) -> tuple[Counter[str], list[str]]:
    """Try inputs one after the other, in a process of their own.

    Returns:
        How often each outcome came, and a line for each fault.
    """
    prepare(artefacts)
    outcomes, faults = Counter[str](), []
    with tempfile.TemporaryDirectory() as name:
        os.environ["TMPDIR"] = tempfile.tempdir = name  # what is written on the way is within, too
        for _, names, _, readers in KINDS.values():  # once as it is, before anything is measured
            for reader in dict.fromkeys(readers):
                place = Path(name) / "first"
                shutil.copytree(artefacts / names[0], place)
                with contextlib.redirect_stdout(io.StringIO()):
                    reader(place, random.Random(0))
                shutil.rmtree(place)
        watch = Watch(Path(name))
        for kind, seed in seeds:
            outcome = try_input(kind, seed, Path(name), watch)
            outcomes[f"{kind}: {outcome.kind}"] += 1
            if outcome.fault:
                faults.append(f"--kind {kind} --only {seed}: {outcome.fault}")
    return outcomes, faults


def main() -> int:
    """Run the trials and say what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=200_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="the number of the first input of each kind")
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--only", type=int, help="the number of a single input")
    options = parser.parse_args()
    kinds = {name: share for name, (share, *_) in KINDS.items() if options.kind in (None, name)}
    counts = {name: round(options.inputs * share / sum(kinds.values())) for name, share in kinds.items()}
    seeds = [(name, options.seed + number) for name, count in counts.items() for number in range(count)]
    if options.only is not None:
        seeds = [(options.kind, options.only)]
    random.Random(0).shuffle(seeds)
    begun = time.monotonic()
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as artefacts:
        with contextlib.redirect_stdout(io.StringIO()):
            make_artefacts(Path(artefacts))
        chunks = [seeds[start : start + 2500] for start in range(0, len(seeds), 2500)]
        outcomes, faults = Counter[str](), []
        context = multiprocessing.get_context("spawn")
        with context.Pool(min(options.workers, len(chunks)), maxtasksperchild=1) as pool:
            for counted, found in pool.imap_unordered(partial(work, Path(artefacts)), chunks):
                outcomes += counted
                faults += found
                print("\n".join([*found, f"{outcomes.total():,} of {len(seeds):,}"]), flush=True)
    print(json.dumps(dict(sorted(outcomes.items())), indent=2))
    print(f"{len(seeds):,} inputs in {time.monotonic() - begun:.0f} s: {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
