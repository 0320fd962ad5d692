"""Modules by the names that they had before the package was put into rooms.

`import memtune.checkpoint` gives `memtune.storage.adapter_folder`, the very same module, with a `FutureWarning` that
names it. These names go with version 0.2; the public ones, in `memtune` itself and in its public modules, have not
moved.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_IN_ROOMS = {
    "backbones": "families family freezing fused timm_models timm_towers views",
    "cli": "finetuning",
    "data": "augmentation",
    "evaluation": "metrics",
    "explaining": "explanation observation",
    "methods": "adapter low_rank peft_names registry",
    "models": "multitask tuned",
    "preparation": "distribution",
    "storage": "atomic card collection hub_errors",
    "streams": "attention casting following passes stacking",
    "tasks": "answering arrangement checks lanes plan task",
    "training": "averaging dynamic_freezing optimization run_settings token_selection",
}
_RENAMED = {
    "checkpoint": "storage.adapter_folder",
    "cli_commands": "cli.commands",
    "contact_sheet": "drawing",
    "continual_folder": "continual.folder",
    "continual_result": "continual.result",
    "explanation_picture": "explaining.pictures",
    "fingerprint": "backbones.fingerprints",
    "merge": "tasks.merging",
    "mixing": "data.augmentation",
    "sharing": "models.shared",
    "sources": "models.shared",
    "sweep_data": "data.splitting",
    "sweep_folder": "search.folder",
    "sweep_result": "search.result",
    "sweep_space": "search.space",
    "training_arguments": "preparation.arguments",
    "training_checkpoint": "training.checkpoint",
    "training_config": "preparation.config",
    "training_result": "training.result",
    "training_run": "training.run",
    "trunk_data": "trunk_cache.filling",
    "trunk_reader": "trunk_cache.reader",
}
MOVED = {name: f"{room}.{name}" for room, names in _IN_ROOMS.items() for name in names.split()} | _RENAMED
"""Each name that a module of `memtune` had, and the one that it has; both without `memtune.`."""


class MovedModules(MetaPathFinder, Loader):
    """Finds a moved module under its old name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A specification of the module, if it is one that has moved."""
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == __package__ and name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Put the module that has the new name in the place of `module`."""
        old = module.__name__
        new = f"{__package__}.{MOVED[old.rpartition('.')[2]]}"
        warnings.warn(f"{old} is {new} now; its old name goes with memtune 0.2.", FutureWarning, stacklevel=2)
        sys.modules[old] = import_module(new)
