"""The methods by their names: those of memtune and those that other packages add.

A package adds a method either by `register_method` when it is imported, or by an entry point of the group
`memtune.methods`, whose value is the adapter class; it is then found without an import.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any, TypeVar

from .adapter import Adapter, AdapterConfig
from .backbones import Backbone
from .errors import ConfigError

AdapterClass = TypeVar("AdapterClass", bound=type[Adapter])

_METHODS: dict[str, type[Adapter]] = {}


def register_method(adapter_class: AdapterClass) -> AdapterClass:
    """Make a method known by the name that its configuration carries. Usable as a class decorator.

    Raises:
        ConfigError: Another class has that name, or the class is not an `Adapter` with a `config_class`.
    """
    config_class = getattr(adapter_class, "config_class", None)
    if not (isinstance(config_class, type) and issubclass(config_class, AdapterConfig)):
        raise ConfigError(f"{adapter_class!r} has no config_class that is an AdapterConfig")
    name = config_class.method
    known = _METHODS.setdefault(name, adapter_class)
    if known is not adapter_class:
        raise ConfigError(
            f"the method {name!r} is {known.__module__}.{known.__qualname__} already; choose another name"
        )
    return adapter_class


def method_names() -> list[str]:
    """The names of all methods, those of installed entry points included."""
    return sorted({*_METHODS, *(entry.name for entry in entry_points(group="memtune.methods"))})


def find_method(name: str) -> type[Adapter]:
    """The adapter class of a method.

    Raises:
        ConfigError: No method has that name.
    """
    if name not in _METHODS:
        for entry in entry_points(group="memtune.methods", name=name):
            register_method(entry.load())
    if name not in _METHODS:
        raise ConfigError(f"got the method {name!r}, expected one of {method_names()}")
    return _METHODS[name]


def read_config(values: Mapping[str, Any]) -> AdapterConfig:
    """The configuration that `AdapterConfig.to_dict` wrote.

    Raises:
        ConfigError: The method is missing or unknown, or a setting is.
    """
    if not isinstance(values, Mapping) or not isinstance(values.get("method"), str):
        raise ConfigError(f"got {values!r}, expected a method's settings with its name under 'method'")
    return find_method(values["method"]).config_class.from_dict(values)


def as_config(value: Any) -> AdapterConfig:
    """A configuration as it is, or what a method makes of another library's (such as `peft.LoraConfig`).

    Raises:
        ConfigError: No method knows the value, or the method cannot do what it asks for.
    """
    if isinstance(value, AdapterConfig):
        return value
    adopted = (adapter_class.config_class.adopt(value) for adapter_class in _METHODS.values())
    config = next((config for config in adopted if config is not None), None)
    if config is None:
        raise ConfigError(f"got {value!r}, expected a configuration such as MemoryConfig(tokens=4)")
    return config


def create_adapter(config: AdapterConfig, backbone: Backbone) -> Adapter:
    """A new adapter with the method's initial values."""
    return find_method(config.method)(config, backbone)
