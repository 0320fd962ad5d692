"""Views: the same parameters under other module objects.

A view of a model is a tree of new module objects that share the parameters, buffers and hooks of the originals. What is
changed in a view (a role replaced, an attention function chosen, a hook placed) is unknown to the original, so the
original needs no undoing: it was never touched. Casting or moving the original moves its views too, because
`torch.nn.Module` does that in the dictionaries that both share.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import UnsupportedBackboneError


def shadow(module: nn.Module, _seen: dict[int, nn.Module] | None = None) -> nn.Module:
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
    seen = {} if _seen is None else _seen
    if id(module) in seen:
        return seen[id(module)]
    if "forward" in module.__dict__:
        raise UnsupportedBackboneError(
            f"{type(module).__name__} has had its forward method replaced on the instance (accelerate's dispatch_model "
            "does so); memtune cannot look inside it. Wrap the model first, or load it without device_map."
        )
    view = object.__new__(type(module))
    seen[id(module)] = view
    view.__dict__.update(module.__dict__)
    for name, value in module.__dict__.items():
        if name.endswith("_hooks") and isinstance(value, dict):
            view.__dict__[name] = value.copy()
    view.__dict__["training"] = False
    children = {name: child and shadow(child, seen) for name, child in module._modules.items()}
    view.__dict__["_modules"] = children
    return view


def shadow_config(config: Any) -> Any:
    """A shallow copy of a configuration, to be changed without touching the original."""
    copied = object.__new__(type(config))
    copied.__dict__.update(config.__dict__)
    return copied


def structure(module: nn.Module) -> Any:
    """Placeholder."""
    return tuple(
        (id(each), type(each), "forward" in each.__dict__, len(each._forward_hooks)) for each in module.modules()
    )
