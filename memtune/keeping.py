"""What is made of tensors, kept, and made anew when one of them has changed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from ctypes import c_char
from typing import Generic, TypeVar

from torch import Tensor, nn
from xxhash import xxh3_64_intdigest

Made = TypeVar("Made")


class _State:
    """What a tensor is at one moment.

    Args:
        tensor: The tensor. It is not held: what is made of it may be kept for as long as it is there.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = weakref.ref(tensor)
        self._place = tensor.data_ptr()
        self._version = _version(tensor)
        self._digest = _digest(tensor)

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor is as it was."""
        same = self._tensor() is tensor and self._place == tensor.data_ptr() and self._version == _version(tensor)
        return same and self._digest == _digest(tensor)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _digest(tensor: Tensor) -> int:
    """Of the memory itself: a numpy array over it would keep FSDP from freeing it."""
    whole = tensor if tensor.is_contiguous() else tensor.detach().contiguous()
    return xxh3_64_intdigest((c_char * whole.nbytes).from_address(whole.data_ptr()) if whole.nbytes else b"")


class Kept(Generic[Made]):
    """Something made of tensors, which is made once for the same values of the same ones.

    That a tensor has changed is told by its being another one, or in another place, by its version, and by a digest of
    its bytes: what is written through `.data`, as optimizers and averages of weights do, or through numpy, counts as no
    new version. A digest takes about half as long as a cast of the same values. On an accelerator it would wait for the
    device, so what is made of tensors there is not kept; nor is what is made of shards, or of no values ("meta").

    Any number of threads may ask; each gets what is made of the tensors that it gave.

    Args:
        make: Makes it of the tensors.
    """

    def __init__(self, make: Callable[..., Made]) -> None:
        self._make = make
        self._kept: tuple[Hashable, list[_State], Made] | None = None

    def of(self, tensors: Sequence[Tensor], state: Hashable = None) -> Made:
        """What is made of tensors.

        Args:
            tensors: The tensors.
            state: What it depends on beside them, such as autocast's type.
        """
        if not all(map(_can_be_told, tensors)):
            return self._make(*tensors)
        kept = self._kept
        if kept is not None and kept[0] == state and _as_before(kept[1], tensors):
            return kept[2]
        before = [_State(tensor) for tensor in tensors]
        made = self._make(*tensors)
        self._kept = state, before, made
        return made


def _as_before(states: Sequence[_State], tensors: Sequence[Tensor]) -> bool:
    return len(states) == len(tensors) and all(map(_State.holds, states, tensors))


def _can_be_told(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and type(tensor) in (Tensor, nn.Parameter)
