"""The module names that PEFT's configurations and folders are written in, and the roles that they stand for.

PEFT names what it adapts by module paths of the release of transformers that it ran with. The names of transformers 4
and 5 for the linear layers of the towers in `memtune.backbones.families` stand here, and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError

LINEAR_ROLES = ("query", "key", "value", "out", "fc1", "fc2")
"""The roles that are linear layers, in the order of computation."""

_PATHS: dict[str, tuple[str, ...]] = {
    # transformers 5; CLIP and SigLIP; transformers 4: ViT, DeiT, BEiT, DINOv2, I-JEPA; Swin
    "query": ("attention.q_proj", "self_attn.q_proj", "attention.attention.query", "attention.self.query"),
    "key": ("attention.k_proj", "self_attn.k_proj", "attention.attention.key", "attention.self.key"),
    "value": ("attention.v_proj", "self_attn.v_proj", "attention.attention.value", "attention.self.value"),
    "out": ("attention.o_proj", "self_attn.out_proj", "attention.output.dense"),
    "fc1": ("mlp.fc1", "mlp.up_proj", "intermediate.dense"),
    "fc2": ("mlp.fc2", "mlp.down_proj", "output.dense"),
}
_ROLES = {path: role for role, paths in _PATHS.items() for path in paths}

_BLOCK = re.compile(r"(?:^|\.)layers?\.(\d+)\.(?:blocks\.(\d+)\.)?([a-z_][\w.]*)$")
_OTHER_TOWERS = ("text_model.", "decoder.")


def roles_of_targets(targets: Any) -> list[str] | None:
    """The roles that PEFT's `target_modules` selects: those whose path ends with one of its names; None for None.

    Raises:
        ConfigError: A name is that of no linear layer of a block; all such are named.
    """
    if targets is None:
        return None
    if targets == "all-linear":
        return list(LINEAR_ROLES)
    chosen = {name: _roles_of_name(name) for name in ([targets] if isinstance(targets, str) else targets)}
    unknown = [name for name, roles in chosen.items() if not roles or isinstance(targets, str)]
    if unknown:
        raise ConfigError(
            f"target_modules: got {sorted(unknown)}, expected a list of names of a block's linear layers, such as "
            "'q_proj', 'query' or 'mlp.fc1', or 'all-linear'; choose blocks by layers_to_transform"
        )
    return [role for role in LINEAR_ROLES if any(role in roles for roles in chosen.values())]


def _roles_of_name(name: str) -> set[str]:
    return {role for path, role in _ROLES.items() if path == name or path.endswith(f".{name}")}


def locate(path: str) -> tuple[tuple[int, ...], str] | None:
    """Read a module path such as `vit.encoder.layer.3.attention.attention.query`.

    Returns:
        The numbers in the block's path (`layers.1.blocks.0` has two) and the role; None for any other module.
    """
    found = _BLOCK.search(path)
    if found is None or found[3] not in _ROLES or any(tower in path for tower in _OTHER_TOWERS):
        return None
    return tuple(int(number) for number in found.groups()[:2] if number is not None), _ROLES[found[3]]


def check_roles(roles: Any) -> tuple[str, ...]:
    """Roles of linear layers in their order.

    Raises:
        ConfigError: They are none, or one is named twice.
    """
    given = list(roles) if isinstance(roles, Sequence) and not isinstance(roles, str) else []
    if not given or len(set(given)) < len(given) or not set(given) <= set(LINEAR_ROLES):
        raise ConfigError(f"roles: got {roles!r}, expected some of {LINEAR_ROLES}, each once, or None")
    return tuple(role for role in LINEAR_ROLES if role in given)
