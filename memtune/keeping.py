"""Placeholder."""

from __future__ import annotations

from typing import Any


class Kept:
    def __init__(self, make: Any) -> None:
        self._make = make
        self._state: Any = None
        self._value: Any = None

    def of(self, tensors: Any, state: Any = None) -> Any:
        now = [(id(t), t.data_ptr(), t._version, t.dtype, float(t.double().sum())) for t in tensors], state
        if now != self._state:
            self._value = self._make(*tensors)
            self._state = now
        return self._value
