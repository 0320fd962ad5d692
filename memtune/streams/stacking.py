"""The parameters of one task or of many, side by side, so that one pass serves them all without a loop over tasks.

A method reads what it has in a block from a `Stack`, and so is written once. Where the stream is one task's, a stacked
tensor is that task's own parameter, read at each pass. Where it is several tasks', their values live in one tensor with
an entry for each task, padded to the largest, and their parameters are parts of it: what is written into one of them,
in whatever way, is in the stack already. Where some tasks lack the method, these have a neutral entry.

A `Selection` says at each pass which tasks are asked for: all or some of them for each image (they are then the tokens
of a stream), or one for each image (a mixed batch).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from ..keeping import Kept

_MOVING = threading.Lock()
"""Held while parameters are looked at, and moved to where those of other tasks are."""


class Selection:
    """Which tasks the present pass of a stream is for: set before the pass, read by what is attached to the view.

    Each thread has its own. It lies beside the view, not in the pass, as a linear layer is given no more than states.
    """

    def __init__(self) -> None:
        self._chosen = threading.local()

    @property
    def index(self) -> Tensor | None:
        """Numbers of the tasks: one for each token of a stream, or one for each image; None for all in their order."""
        return getattr(self._chosen, "index", None)

    @property
    def by_row(self) -> bool:
        """Whether each image has a task of its own."""
        return getattr(self._chosen, "by_row", False)

    def choose(self, index: Tensor | None, *, by_row: bool) -> None:
        """Say what the next pass is for."""
        self._chosen.index, self._chosen.by_row = index, by_row

    def spread(self, stacked: Tensor, lookup: Tensor | None = None) -> Tensor:
        """A stack (tasks, ...) as (1 or images, 1 or tasks, ...), the chosen ones of it.

        Args:
            stacked: The stack.
            lookup: For each task the entry of the stack that is its own; None if they are in the order of the tasks.
        """
        index = self.index
        if lookup is not None:
            index = lookup if index is None else lookup[index]
        chosen = stacked if index is None else stacked.index_select(0, index)
        return chosen.unsqueeze(1) if self.by_row else chosen.unsqueeze(0)


class Stack:
    """What the tasks of a stream have in one place, such as the memory of each in one block.

    Attributes:
        parts: The modules that have the parameters, of those tasks that have any here.
        alone: The part, where the stream is of one task; None where it is of several.

    Args:
        parts: For each task of the stream its module, or None.
        selection: That of the stream.
    """

    def __init__(self, parts: Sequence[Any], selection: Selection) -> None:
        self.parts = [part for part in parts if part is not None]
        self.alone: Any = self.parts[0] if len(parts) == 1 else None
        self._of_tasks = list(parts)
        self._selection = selection
        self._entries: dict[str, _Entries] = {}
        self._kept: list[Stack | Stacked] = []
        self._lookup: Tensor | None = None
        if len(self.parts) < len(parts):
            entries = iter(range(len(self.parts)))
            lookup = [len(self.parts) if part is None else next(entries) for part in parts]
            self._lookup = torch.tensor(lookup, device=next(self.parts[0].parameters()).device)

    @property
    def complete(self) -> bool:
        """Whether each task of the stream has a part."""
        return self._lookup is None

    def of(self, find: Callable[[Any], Any]) -> Stack | None:
        """A stack of something in each part, which `find` gives, or None for a part that lacks it; None if all do."""
        found = [None if part is None else find(part) for part in self._of_tasks]
        if all(part is None for part in found):
            return None
        stack = Stack(found, self._selection)
        self._kept.append(stack)
        return stack

    def tensor(self, name: str, *, neutral: float = 0.0) -> Stacked:
        """A parameter or buffer of each part.

        Args:
            name: Its attribute's name in the part.
            neutral: What a padded value is, and each value of a task without a part.
        """
        return self._add(Stacked(self, [self.entries(name, neutral)]))

    def made(
        self, make: Callable[..., Any], *names: str, neutral: float = 0.0, of: Sequence[nn.Module] = ()
    ) -> Stacked:
        """What is made of parameters, and of frozen layers of the view.

        Where no gradient is recorded it is kept until something behind it changes.

        Args:
            make: Gives a tensor, or a tuple of such, for the parameters: of one task as they are, of several with these
                as first dimension, which what it gives has as well.
            names: The parameters' names.
            neutral: What each value is of a task without a part.
            of: The layers.
        """
        return self._add(Stacked(self, [self.entries(name) for name in names], make, neutral=neutral, layers=of))

    def entries(self, name: str, neutral: float = 0.0) -> _Entries:
        """One parameter of all parts; the same object for all that is made of it, as it can live in one place only."""
        return self._entries.setdefault(name, _Entries(self.parts, name, neutral, lacking=self._lookup is not None))

    def _add(self, stacked: Stacked) -> Stacked:
        self._kept.append(stacked)
        return stacked

    def sizes(self, read: Callable[[Any], int]) -> list[int]:
        """A number of each part; where tasks lack the part, a last one, 0, of these."""
        return [read(part) for part in self.parts] + [0] * (self._lookup is not None)

    def present(self, name: str) -> Callable[[], Tensor] | None:
        """Gives which entries along a parameter's first dimension a task really has, (..., largest); None if all do."""
        sizes = self.sizes(lambda part: len(getattr(part, name)))
        if len(set(sizes)) == 1:
            return None
        device = getattr(self.parts[0], name).device
        real = torch.arange(max(sizes), device=device) < torch.tensor(sizes, device=device)[:, None]
        return lambda: self.spread(real)

    def spread(self, values: Tensor) -> Tensor:
        """Of entries (tasks, ...) those that the pass is for, (1 or images, 1 or tasks, ...)."""
        return self._selection.spread(values, self._lookup)

    def refresh(self) -> None:
        """Before a pass: make anew what was kept of values that are others now."""
        if self.alone is None:
            for each in self._kept:
                each.refresh()


class Stacked:
    """One parameter of all parts of a stack, or what is made of some; a call gives it for the tasks of the pass.

    Of one task it is the parameter itself, without a dimension in front. Made by `Stack.tensor` and `Stack.made`.
    """

    def __init__(
        self,
        stack: Stack,
        entries: Sequence[_Entries],
        make: Callable[..., Any] | None = None,
        *,
        neutral: float = 0.0,
        layers: Sequence[nn.Module] = (),
    ) -> None:
        self._stack = stack
        self._entries = entries
        self._make = make
        self._neutral = neutral
        self._layers = layers
        self._kept = Kept(self._of_several if stack.alone is None else self._of_one)
        self._value: Any = None

    def __call__(self) -> Any:
        """The tensor (or tensors): of one task as it is, of several (1 or images, 1 or tasks, ...)."""
        alone = self._stack.alone
        if alone is not None:
            parameters = [getattr(alone, each.name) for each in self._entries]
            keeps = self._make is not None and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
            return self._keep(parameters) if keeps else self._of_one(*parameters)
        if torch.is_grad_enabled() and any(each.trains() for each in self._entries):
            return _each(self._stack.spread, self._of_several(*(each.stacked() for each in self._entries)))
        if self._value is None:
            self.refresh()
        return _each(self._stack.spread, self._value)

    @property
    def complete(self) -> bool:
        """Whether each task of the stream has one of its own."""
        return self._stack.complete

    def like(self, states: Tensor) -> Tensor:
        """The same in the type of states (rows, tokens, ...), to be broadcast to them."""
        values = self()
        if self._stack.alone is None:
            values = fit_rows(values, states.shape[0])
        return values.to(states.dtype)

    def refresh(self) -> None:
        """Before a pass: make anew what was kept of values that are others now."""
        tensors = [each.home() for each in self._entries]
        if self._make is None:
            self._value = tensors[0]
            return
        self._value = self._keep(tensors)

    @torch.no_grad()
    def _keep(self, tensors: Sequence[Tensor]) -> Any:
        """What is made of a task's parameters, or of several side by side: made anew only if something changed."""
        device = tensors[0].device.type
        state = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        frozen = [parameter for layer in self._layers for parameter in layer.parameters()]
        return self._kept.of([*tensors, *frozen], state=state)

    def _of_one(self, *tensors: Tensor) -> Any:
        """What is made of a task's parameters, the first of the tensors; those of the layers are read there."""
        # Without the mark that a view of a parameter has, that it requires a gradient, where none is recorded.
        own = [tensor if torch.is_grad_enabled() else tensor.detach() for tensor in tensors[: len(self._entries)]]
        return own[0] if self._make is None else self._make(*own)

    def _of_several(self, *tensors: Tensor) -> Any:
        """The same for the parameters of several tasks side by side."""
        if self._make is None:
            return tensors[0]
        number = len(self._stack.parts)
        made = self._make(*(tensor[:number] for tensor in tensors[: len(self._entries)]))
        lacking = len(tensors[0]) > number
        return _each(self._with_neutral, made) if lacking else made

    def _with_neutral(self, made: Tensor) -> Tensor:
        return torch.cat([made, torch.full_like(made[:1], self._neutral)])


def _each(change: Callable[[Tensor], Tensor], made: Any) -> Any:
    """A tensor, or each of several, changed."""
    return tuple(map(change, made)) if isinstance(made, tuple) else change(made)


class _Entries:
    """One parameter of several parts, whose values live side by side in one tensor.

    Args:
        parts: The parts.
        name: The parameter's name.
        neutral: What padded values are.
        lacking: Whether there is a neutral entry after the others.
    """

    def __init__(self, parts: Sequence[Any], name: str, neutral: float, *, lacking: bool) -> None:
        self.name = name
        self._parts = parts
        self._neutral = neutral
        self._lacking = lacking
        self._home: Tensor | None = None
        self._places: list[tuple[dict[str, Any], Tensor, int]] = []

    def trains(self) -> bool:
        """Whether one of them is to get a gradient."""
        return any(getattr(part, self.name).requires_grad for part in self._parts)

    def stacked(self) -> Tensor:
        """The parameters side by side, (tasks, ...), with gradients to each."""
        tensors = [getattr(part, self.name) for part in self._parts]
        shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
        entries = [_padded(tensor, shape, self._neutral) for tensor in tensors]
        if self._lacking:
            entries.append(torch.full_like(entries[0], self._neutral))
        return torch.stack(entries)

    def home(self) -> Tensor:
        """The tensor that the parameters live in, (tasks, ...); they move in where one is not there."""
        with _MOVING:  # a tensor must not be read while another thread moves it
            there = (
                holder.get(self.name) is tensor and tensor.data_ptr() == place for holder, tensor, place in self._places
            )
            if self._home is None or not all(there):
                self._home = self._move_in()
            return self._home

    @torch.no_grad()
    def _move_in(self) -> Tensor:
        home = self.stacked()
        self._places = []
        for entry, part in zip(home, self._parts, strict=False):
            tensor = getattr(part, self.name)
            place = -1  # where it cannot live there, it is copied at each pass
            if tensor.dtype == home.dtype and not tensor.is_inference():
                tensor.data = entry[tuple(slice(size) for size in tensor.shape)]
                place = tensor.data_ptr()
            self._places.append((_holder(part, self.name), tensor, place))
        return home


def _holder(part: Any, name: str) -> dict[str, Any]:
    """The dictionary in which a module has a parameter or buffer."""
    return part._parameters if name in part._parameters else part._buffers


def _padded(tensor: Tensor, shape: Sequence[int], value: float) -> Tensor:
    missing = [size - own for own, size in zip(tensor.shape, shape, strict=True)]
    if not any(missing):
        return tensor
    return pad(tensor, [count for size in reversed(missing) for count in (0, size)], value=value)


def per_task(states: Tensor, weights: Tensor) -> Tensor:
    """The product of each state with its task's matrix.

    Args:
        states: (rows, tokens, in), the rows being images or their windows; for one task also of other dimensions.
        weights: Of one task (in, out), of several (1 or images, 1 or tokens, in, out).

    Returns:
        (rows, tokens, out).
    """
    if weights.ndim == 2:
        return states @ weights.to(states.dtype)
    if weights.shape[:2] == (1, 1):  # of one of several tasks
        return states @ weights[0, 0].to(states.dtype)
    weights = fit_rows(weights, states.shape[0]).to(states.dtype)
    if weights.shape[1] == 1:  # of each image, for all its tokens
        return states @ weights.squeeze(1)
    if weights.shape[0] == 1:  # of each token, for all images
        return (states.transpose(0, 1) @ weights.squeeze(0)).transpose(0, 1)
    return torch.einsum("ntd,ntdr->ntr", states, weights)


def linear_per_task(states: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    """W x + b of each state by its task's linear layer, in the type of the weights.

    Args:
        states: (rows, tokens, in).
        weights: Of one task (out, in), of several (1 or images, 1 or tokens, out, in).
        biases: (out,) or (1 or images, 1 or tokens, out).

    Returns:
        (rows, tokens, out).
    """
    states = states.to(weights.dtype)
    return linear(states, weights, biases) if weights.ndim == 2 else per_task(states, weights.mT) + biases


def in_front(values: Tensor, dimensions: int) -> Tensor:
    """What one task has, or several, with as many dimensions as of several: those in front are 1 for one task."""
    missing = dimensions - values.ndim
    return values.view(*[1] * missing, *values.shape) if missing else values


def fit_rows(spread: Tensor, rows: int) -> Tensor:
    """Repeat what each image has for all rows that a pass has of it (the windows of a windowed backbone).

    What is there once for all images stays so, as it broadcasts.

    Args:
        spread: Of several tasks, (1 or images, 1 or tasks, ...).
        rows: Their number.
    """
    images = spread.shape[0]
    return spread if images in (1, rows) else spread.repeat_interleave(rows // images, dim=0)
