"""Views: the same parameters under other module objects.

A view of a model is a tree of new module objects that share the parameters and buffers of the originals, and have the
hooks that these had when it was made. What is changed in a view (a role replaced, an attention function chosen, a hook
placed) is unknown to the original, so the original needs no undoing: it was never touched. Casting or moving the
original moves its views too, because `torch.nn.Module` does that in the dictionaries that both share.
"""

from __future__ import annotations

from collections.abc import Hashable
from types import MethodType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import UnsupportedBackboneError

_PACKS = "support_avx512bf16_for_cpu"
"""Whether a 4-bit layer of bitsandbytes packs its weight for a kernel of some CPUs through which no gradient goes."""


def shadow(module: nn.Module, _known: dict[int, nn.Module] | None = None) -> nn.Module:
    """Make a view of `module` in evaluation mode.

    Args:
        module: The module to view, with all its children.

    Returns:
        A module of the same class. Its parameters and buffers are the originals, its children are views of the
        originals' children; hooks placed on either later are not seen by the other.

    Raises:
        UnsupportedBackboneError: A module carries a `forward` of its own that is bound to the original (as after
            `accelerate.dispatch_model`), so that a view would run the original in its place.
    """
    known = {} if _known is None else _known
    if id(module) in known:
        return known[id(module)]
    if "forward" in module.__dict__:
        raise UnsupportedBackboneError(
            f"{type(module).__name__} has had its forward method replaced on the instance (accelerate's offloading and "
            "device maps do so); memtune cannot look inside it. Load it without device_map, or take that off again by "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True)"
        )
    view = object.__new__(type(module))
    known[id(module)] = view
    view.__dict__.update(module.__dict__)
    for name, value in module.__dict__.items():
        if _is_of_hooks(name, value):
            view.__dict__[name] = value.copy()
        elif isinstance(value, MethodType) and value.__self__ is module:  # of the original, on which it would run
            view.__dict__[name] = MethodType(value.__func__, view)
    view.__dict__["training"] = False
    if _PACKS in view.__dict__:
        view.__dict__[_PACKS] = False
    view.__dict__.pop("_compiled_call_impl", None)  # of `module.compile()`: it would run the original
    children = {name: child and shadow(child, known) for name, child in module._modules.items()}
    view.__dict__["_modules"] = children
    return view


def _is_of_hooks(name: str, value: Any) -> bool:
    """Whether an attribute of a module is one of torch's dictionaries of hooks, or of marks of hooks."""
    return "_hooks" in name and isinstance(value, dict)


def structure(module: nn.Module) -> Hashable:
    """What a view is made of beside tensors: it is another one when a view made now would not be as one made before.

    Modules put in or taken out, hooks placed or removed, and a forward that was replaced count; values, devices, types
    and modes do not, as a view has those of the original.
    """
    return tuple(
        (
            each,
            type(each),
            "forward" in each.__dict__,
            *each._modules.values(),
            *(key for name, hooks in each.__dict__.items() if _is_of_hooks(name, hooks) for key in hooks),
        )
        for each in module.modules()
    )


class HookWatch:
    """Notices, at the cost of a comparison, that hooks may have been placed on a module or removed from it.

    Args:
        module: The module, as views of it are made.
    """

    def __init__(self, module: nn.Module) -> None:
        self._placed = RemovableHandle.next_id  # of all hooks of all modules
        hooks = [
            value for each in module.modules() for name, value in each.__dict__.items() if _is_of_hooks(name, value)
        ]
        self._there = [(each, len(each)) for each in hooks if each]

    def rings(self) -> bool:
        """Whether hooks have been placed anywhere, or removed here."""
        return self._placed != RemovableHandle.next_id or any(len(hooks) != count for hooks, count in self._there)


def shadow_config(config: Any) -> Any:
    """A shallow copy of a configuration, to be changed without touching the original."""
    copied = object.__new__(type(config))
    copied.__dict__.update(config.__dict__)
    return copied
