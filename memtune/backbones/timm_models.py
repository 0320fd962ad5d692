"""timm's models in the forms of transformers' own. No timm is imported before there is one."""

from __future__ import annotations

import json
import sys
import weakref
from typing import Any
from weakref import WeakKeyDictionary

import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

_WRAPPERS: WeakKeyDictionary[nn.Module, weakref.ref[PreTrainedModel]] = WeakKeyDictionary()
"""The wrapper of each timm model, while there is one: who holds a model frozen is counted by wrapper."""


def timm_class(model: nn.Module) -> str | None:
    """The name of the first of a model's classes that is timm's, or None."""
    return next((kind.__name__ for kind in type(model).__mro__ if kind.__module__.startswith("timm.")), None)


def wrap_timm(inner: Any) -> PreTrainedModel:
    """The wrapper of transformers around a vision transformer of timm's: this very object, which stays as it is."""
    known = _WRAPPERS.get(inner)
    wrapper = None if known is None else known()
    if wrapper is None:
        wrapper = wrap_again(inner, _config(inner), with_head=inner.num_classes > 0)
        _WRAPPERS[inner] = weakref.ref(wrapper)
    return wrapper


def wrap_again(inner: nn.Module, config: Any, *, with_head: bool) -> PreTrainedModel:
    """A wrapper of transformers around a timm model that is there; its own `__init__` makes another one.

    Args:
        inner: The timm model.
        config: The wrapper's configuration.
        with_head: Whether to take transformers' class for image classification.
    """
    kind: Any = getattr(transformers, "TimmWrapperForImageClassification" if with_head else "TimmWrapperModel")
    wrapper = kind.__new__(kind)
    PreTrainedModel.__init__(wrapper, config)
    wrapper.num_labels = config.num_labels
    wrapper.features_only = False
    wrapper.timm_model = nn.Identity()
    wrapper.post_init()  # which would initialise the weights of the timm model
    wrapper.timm_model = inner
    wrapper.supports_gradient_checkpointing = True
    wrapper.training = inner.training
    return wrapper


def _config(inner: Any) -> PretrainedConfig:
    """The configuration of a timm model's wrapper, by which transformers makes such a model again."""
    patches = inner.patch_embed
    known = {name: value for name, value in (getattr(inner, "pretrained_cfg", None) or {}).items() if _is_json(value)}
    known |= {"input_size": [patches.proj.in_channels, *patches.img_size]}
    known.pop("num_classes", None)
    arguments = getattr(sys.modules.get("timm.models"), "get_model_args", lambda model: {})(inner)
    arguments = {name: value for name, value in arguments.items() if name != "num_classes" and _is_json(value)}
    settings: dict[str, Any] = {
        "architecture": known.get("architecture", type(inner).__name__),
        "model_args": arguments or None,
        "pretrained_cfg": known,
    }
    if inner.num_classes:
        settings["num_labels"] = inner.num_classes
    config = transformers.TimmWrapperConfig(**settings)  # here, as it imports timm
    config._name_or_path = known.get("hf_hub_id") or ""
    return config


def _is_json(value: Any) -> bool:
    try:
        return value is not None and bool(json.dumps(value))
    except TypeError:
        return False
