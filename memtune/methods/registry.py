"""The methods by their names: those of memtune and those that other packages add.

A package adds a method either by `register_method` when it is imported, or by an entry point of the group
`memtune.methods`, whose value is the adapter class; it is then found without an import.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from ..backbones import Backbone
from ..errors import ConfigError
from .adapter import Adapter, AdapterConfig

GROUP = "memtune.methods"
"""The group of entry points in which packages name their methods."""

AdapterClass = TypeVar("AdapterClass", bound=type[Adapter])

_METHODS: dict[str, type[Adapter]] = {}


def register_method(adapter_class: AdapterClass) -> AdapterClass:
    """Make a method known by the name that its configuration carries. Usable as a class decorator.

    Example:
        >>> class ScaleConfig(memtune.AdapterConfig):
        ...     method = "scale"
        >>> @memtune.register_method
        ... class ScaleAdapter(memtune.Adapter):
        ...     config_class = ScaleConfig

    Raises:
        ConfigError: Another class has that name, or the class is not an `Adapter` with a `config_class`.
    """
    config_class = getattr(adapter_class, "config_class", None)
    if not (isinstance(config_class, type) and issubclass(config_class, AdapterConfig)):
        raise ConfigError(f"{adapter_class!r} has no config_class that is an AdapterConfig")
    name = config_class.method
    known = _METHODS.setdefault(name, adapter_class)
    if known is not adapter_class:
        raise ConfigError(f"{_path(adapter_class)}: the method {name!r} is {_path(known)} already; choose another name")
    return adapter_class


def _path(adapter_class: type) -> str:
    return f"{adapter_class.__module__}.{adapter_class.__qualname__}"


def method_names() -> list[str]:
    """The names of all methods, those of installed entry points included."""
    return sorted({*_METHODS, *(entry.name for entry in entry_points(group=GROUP))})


def find_method(name: str) -> type[Adapter]:
    """The adapter class of a method. One that is known already goes before those of entry points.

    Raises:
        ConfigError: No method has that name, or several installed packages do, or one's cannot be imported.
    """
    if name not in _METHODS:
        _load_installed(name)
    if name not in _METHODS:
        raise ConfigError(f"got the method {name!r}, expected one of {method_names()}")
    return _METHODS[name]


def _load_installed(name: str) -> None:
    """Register the method that an entry point gives, if there is one."""
    entries = {entry.value: entry for entry in entry_points(group=GROUP, name=name)}
    if len(entries) > 1:
        found = " and ".join(sorted(map(_origin, entries.values())))
        raise ConfigError(f"the method {name!r} is in several installed packages: {found}; uninstall all but one")
    for entry in entries.values():
        try:
            adapter_class = register_method(entry.load())
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"the method {name!r} of {_origin(entry)} cannot be imported: {error}") from error
        if (own := adapter_class.config_class.method) != name:
            raise ConfigError(f"the entry point {name!r} of {_origin(entry)} gives the method {own!r}; name both alike")


def _origin(entry: EntryPoint) -> str:
    """The package of an entry point and what it points to."""
    return entry.value if entry.dist is None else f"{entry.dist.name} {entry.dist.version} ({entry.value})"


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
