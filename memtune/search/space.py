"""What a search chooses from: settings by name, each with a distribution of Optuna."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, MemtuneError
from ..methods import AdapterConfig
from ..preparation import TrainingConfig

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

TRAINING_SETTINGS = (
    "learning_rate",
    "layerwise_lr_decay",
    "weight_decay",
    "label_smoothing_factor",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "momentum",
    "warmup_ratio",
    "lr_scheduler_type",
    "max_grad_norm",
    "mixup_alpha",
    "cutmix_alpha",
    "randaugment_ops",
    "randaugment_magnitude",
    "ema_decay",
    "image_size",
)
"""Settings of `TrainingConfig` that change what is trained, and that a search may so choose."""

_PLAIN = (type(None), bool, int, float, str)
"""Types of choices that Optuna can keep in a file; others are kept as their JSON text."""


def find_optuna() -> Any:
    """The module `optuna`.

    Raises:
        MemtuneError: It is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise MemtuneError(
            "a search needs Optuna, which is not installed: pip install optuna, or 'memtune[sweep]'"
        ) from error
    return optuna


class Space:
    """The settings that are searched.

    Attributes:
        distributions: For each setting, in the order given, its distribution.

    Args:
        space: For each setting its distribution: one of Optuna's, a list of choices, or a tuple (low, high).
        training: The settings of training; what is not searched stays as it is there.
        configs: The same of the methods.

    Raises:
        ConfigError: A name is unknown, a distribution is wrong, or a value of it is none that the setting takes.
    """

    def __init__(self, space: Mapping[str, Any], training: TrainingConfig, configs: Sequence[AdapterConfig]) -> None:
        if not isinstance(space, Mapping) or not space:
            raise ConfigError(f"space: got {space!r}, expected a distribution for each of one or more settings")
        self._training = training
        self._configs = list(configs)
        self._texts: dict[str, dict[str, Any]] = {}
        self.distributions: dict[str, BaseDistribution] = {}
        for key, given in space.items():
            kind = self._declared_type(key)
            try:
                self.distributions[key] = self._read(key, given, kind)
            except (ValueError, TypeError) as error:
                raise ConfigError(f"space: {key!r}: got {given!r}: {error}") from error
        for values in self.extremes():
            self.settings(values)

    def values(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The values of the settings from what Optuna chose."""
        return {key: self._texts.get(key, {}).get(params[key], params[key]) for key in self.distributions}

    def settings(self, values: Mapping[str, Any]) -> tuple[TrainingConfig, list[AdapterConfig]]:
        """The settings of training and of the methods with some values put in.

        Raises:
            ConfigError: A value is none that its setting takes.
        """
        training, configs = self._training, list(self._configs)
        for key, value in values.items():
            method, _, name = key.rpartition(".")
            try:
                if not method:
                    training = replace(training, **{name: value})
                for place, config in enumerate(configs):
                    if config.method == method:
                        configs[place] = replace(config, **{name: value})
            except (ConfigError, TypeError) as error:
                raise ConfigError(f"space: {key!r} would take the value {value!r}: {error}") from error
        return training, configs

    def extremes(self) -> Iterator[dict[str, Any]]:
        """Values at the ends of each distribution, or all its choices, beside the first ones of the others."""
        ends = {key: self._ends(key) for key in self.distributions}
        first = {key: values[0] for key, values in ends.items()}
        for key, values in ends.items():
            yield from (first | {key: value} for value in values)

    def kinds(self) -> dict[str, str]:
        """How each setting varies: "choices", "linear" or "log"."""
        return {
            key: "choices" if hasattr(each, "choices") else "log" if getattr(each, "log", False) else "linear"
            for key, each in self.distributions.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """The distributions as JSON values."""
        to_json = find_optuna().distributions.distribution_to_json
        return {key: json.loads(to_json(each)) for key, each in self.distributions.items()}

    def _declared_type(self, key: Any) -> str:
        """The type of the setting of a name, as it is written in its class."""
        method, _, name = key.rpartition(".") if isinstance(key, str) else ("", "", key)
        owned = {config.method: config for config in self._configs}
        if not method:
            known = {each.name: each for each in fields(TrainingConfig) if each.name in TRAINING_SETTINGS}
        else:
            known = {each.name: each for each in fields(owned[method]) if each.init} if method in owned else {}
        if name not in known:
            names = [name for name in TRAINING_SETTINGS if name in TrainingConfig.__dataclass_fields__]
            names += [
                f"{config.method}.{each.name}" for config in self._configs for each in fields(config) if each.init
            ]
            raise ConfigError(f"space: got the unknown setting {key!r}, expected some of {names}")
        return str(known[name].type)

    def _read(self, key: str, given: Any, kind: str) -> BaseDistribution:
        """The distribution of a setting whose declared type is `kind`."""
        distributions = find_optuna().distributions
        if isinstance(given, list):
            return self._choices(key, given)
        if isinstance(given, distributions.CategoricalDistribution):
            return self._choices(key, given.choices)
        if isinstance(given, distributions.BaseDistribution):
            if isinstance(given, distributions.FloatDistribution) and "float" not in kind:
                raise ConfigError(f"the setting is of type {kind}; take IntDistribution, or a list of choices")
            return given
        if not (isinstance(given, tuple) and len(given) == 2 and all(type(end) in (int, float) for end in given)):
            raise ConfigError("expected a distribution of Optuna, a list of choices, or a tuple (low, high) of numbers")
        if "float" in kind:
            return distributions.FloatDistribution(*map(float, given))
        if float in map(type, given):
            raise ConfigError(f"the setting is of type {kind}; give whole numbers, or a list of choices")
        return distributions.IntDistribution(*given)

    def _choices(self, key: str, choices: Sequence[Any]) -> BaseDistribution:
        if any(choice in choices[:place] for place, choice in enumerate(choices)):
            raise ConfigError("a choice stands there twice")
        self._texts[key] = {json.dumps(choice): choice for choice in choices if not isinstance(choice, _PLAIN)}
        kept = [choice if isinstance(choice, _PLAIN) else json.dumps(choice) for choice in choices]
        return find_optuna().distributions.CategoricalDistribution(kept)

    def _ends(self, key: str) -> list[Any]:
        each: Any = self.distributions[key]
        texts = self._texts.get(key, {})
        if hasattr(each, "choices"):
            return [texts.get(choice, choice) for choice in each.choices]
        return [each.low, each.high]
