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
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import CheckpointError
from .backbone import Backbone

_STRIDE = 2654435761  # Knuth's multiplicative hash: spreads the places of the samples over the tensors

_ROUNDING = {
    "float64": (2.0**-24, 0.0),
    "float32": (0.0, 0.0),
    "bfloat16": (2.0**-8, 0.0),
    "float16": (2.0**-11, 2.0**-24),
}
"""Relative and absolute error of a float32 value stored in a precision (float16 loses the smallest values)."""


def fingerprint(backbone: Backbone) -> dict[str, str]:
    """The fingerprint of a backbone, as JSON values.

    Returns:
        `dtype`, the precision of the weights, `values`, the samples of what has a role as base64 of little-endian
        float32, and `others`, those of all else in the tower: positions, registers, scales, biases (not in adapters of
        memtune 0.1, and not compared with those). A tensor that holds no floating-point numbers (a quantised one) has
        NaN, which agrees with everything.
    """
    named = [tensor for _, tensor in backbone.parameters_by_role()]
    known = {tensor.data_ptr() for tensor in named}
    others = [tensor for _, tensor in sorted(backbone.tower.named_parameters()) if tensor.data_ptr() not in known]
    sampled = _sample(named, backbone.model.dtype)
    return sampled | ({"others": _sample(others, backbone.model.dtype)["values"]} if others else {})


def head_fingerprint(backbone: Backbone) -> dict[str, str] | None:
    """The same of the model's own head: all parameters outside its tower; None where there are none."""
    tensors = list(backbone.other_parameters())
    return _sample(tensors, backbone.model.dtype) if tensors else None


def stored_parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor is stored as: itself; of one of torchao's quantised ones numbers and scales."""
    if isinstance(tensor, DTensor) or not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in stored_parts(getattr(tensor, name))]


def _sample(tensors: Iterable[Tensor], dtype: torch.dtype) -> dict[str, str]:
    samples = []
    for number, tensor in enumerate(tensors):
        places = [(2 * number + 1) * _STRIDE % tensor.numel(), (2 * number + 2) * _STRIDE % tensor.numel()]
        if stored_parts(tensor)[0] is not tensor or not tensor.is_floating_point():
            samples.append(torch.full((2,), torch.nan))
        else:
            samples.append(tensor.detach().flatten()[places].float())
    values = torch.stack([sample.cpu() for sample in samples]).numpy().astype("<f4").tobytes()
    return {"dtype": str(dtype).removeprefix("torch."), "values": base64.b64encode(values).decode()}


def same_weights(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two fingerprints are of the same weights, perhaps in other precisions.

    Raises:
        CheckpointError: A fingerprint is damaged.
    """
    if "others" in one and "others" in other:
        names = ("dtype", "others")
        (dtype, samples), (other_dtype, other_samples) = ([each.get(name) for name in names] for each in (one, other))
        here, there = {"dtype": dtype, "values": samples}, {"dtype": other_dtype, "values": other_samples}
        if not same_weights(here, there):
            return False
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
