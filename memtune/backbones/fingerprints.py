"""A fingerprint of a backbone's weights that survives a change of precision.

Two values of each tensor are kept as float32, with the precision they came from. Weights are the same if every value
agrees as far as the two precisions allow: exactly between equal ones, within the rounding of the coarser otherwise.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from .backbone import Backbone

_STRIDE = 2654435761  # Knuth's multiplicative hash: spreads the places of the samples over the tensors

_ROUNDING = {"float32": (0.0, 0.0), "bfloat16": (2.0**-8, 0.0), "float16": (2.0**-11, 2.0**-24)}
"""Relative and absolute error of a float32 value stored in a precision (float16 loses the smallest values)."""


def fingerprint(backbone: Backbone) -> dict[str, str]:
    """The fingerprint of a backbone, as JSON values.

    Returns:
        `dtype`, the precision of the weights, and `values`, the samples as base64 of little-endian float32. A tensor
        that holds no floating-point numbers (a quantised one) has NaN, which agrees with everything.
    """
    return _sample((tensor for _, tensor in backbone.parameters_by_role()), backbone.model.dtype)


def head_fingerprint(backbone: Backbone) -> dict[str, str] | None:
    """The same of the model's own head: all parameters outside its tower; None where there are none."""
    tensors = list(backbone.other_parameters())
    return _sample(tensors, backbone.model.dtype) if tensors else None


def _sample(tensors: Iterable[Tensor], dtype: torch.dtype) -> dict[str, str]:
    samples = []
    for number, tensor in enumerate(tensors):
        places = [(2 * number + 1) * _STRIDE % tensor.numel(), (2 * number + 2) * _STRIDE % tensor.numel()]
        values = tensor.detach().flatten()[places]
        samples.append(values.float() if tensor.is_floating_point() else torch.full((2,), torch.nan))
    values = torch.stack([sample.cpu() for sample in samples]).numpy().astype("<f4").tobytes()
    return {"dtype": str(dtype).removeprefix("torch."), "values": base64.b64encode(values).decode()}


def same_weights(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two fingerprints are of the same weights, perhaps in other precisions.

    Raises:
        CheckpointError: A fingerprint is damaged.
    """
    (a, a_dtype), (b, b_dtype) = _read(one), _read(other)
    if a.shape != b.shape:
        return False
    if a_dtype == b_dtype:
        allowed = np.zeros_like(a)
    else:
        (a_relative, a_absolute), (b_relative, b_absolute) = _ROUNDING[a_dtype], _ROUNDING[b_dtype]
        allowed = (a_relative + b_relative) * np.maximum(abs(a), abs(b)) + a_absolute + b_absolute
    unknown = np.isnan(a) | np.isnan(b)
    return bool(np.all(unknown | (abs(a - b) <= allowed)))


def _read(values: Mapping[str, Any]) -> tuple[np.ndarray, str]:
    try:
        samples = np.frombuffer(base64.b64decode(values["values"], validate=True), dtype="<f4")
        _ROUNDING[values["dtype"]]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the backbone's fingerprint is damaged: {error!r}") from error
    return samples.astype(np.float64), values["dtype"]
