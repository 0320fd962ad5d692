"""Several tasks' parameters side by side, so that one pass serves them all without a loop over tasks.

A stack has one row for each task that a method has in a block, padded to the largest, and where some tasks lack the
method a neutral row for these. A `Selection` says at each pass which tasks are asked for: all or some of them for each
image (they are then the tokens of a stream), or one for each image (a mixed batch).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


class Selection:
    """Which tasks the present pass of a stream is for: set before the pass, read by what is attached to the view.

    Each thread has its own.
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
            lookup: For each task the row of the stack that is its own; None if they are in the order of the tasks.
        """
        index = self.index
        if lookup is not None:
            index = lookup if index is None else lookup[index]
        chosen = stacked if index is None else stacked.index_select(0, index)
        return chosen.unsqueeze(1) if self.by_row else chosen.unsqueeze(0)


class Stack:
    """Rows of a method's parameters in one block, for those tasks that have them there.

    Args:
        parts: For each task what the method has in the block, or None.
        selection: That of the view.
    """

    def __init__(self, parts: Sequence[Any], selection: Selection) -> None:
        self._selection = selection
        self.parts = [part for part in parts if part is not None]
        self._lookup: Tensor | None = None
        if len(self.parts) < len(parts):
            rows = iter(range(len(self.parts)))
            neutral = len(self.parts)
            self._lookup = torch.tensor([neutral if part is None else next(rows) for part in parts])

    def rows(self, read: Callable[[Any], Tensor], *, neutral: float = 0.0) -> Tensor:
        """One tensor of each part, padded with `neutral` to the largest; with a row of it where a task has no part."""
        tensors = [read(part).detach() for part in self.parts]
        shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
        rows = [_padded(tensor, shape, neutral) for tensor in tensors]
        if self._lookup is not None:
            rows.append(torch.full_like(rows[0], neutral))
            self._lookup = self._lookup.to(rows[0].device)
        return torch.stack(rows)

    def present(self, read: Callable[[Any], Tensor]) -> Tensor | None:
        """Which of the padded tensors' first entries a part really has, (rows, largest); None if all are there."""
        real = self.rows(lambda part: torch.ones(len(read(part)), dtype=torch.bool, device=read(part).device))
        return None if bool(real.all()) else real

    def chosen(self, rows: Tensor) -> Tensor:
        """The rows of the tasks that the pass is for, (1 or images, 1 or tasks, ...)."""
        return self._selection.spread(rows, self._lookup)


def _padded(tensor: Tensor, shape: Sequence[int], value: float) -> Tensor:
    missing = [size - own for own, size in zip(tensor.shape, shape, strict=True)]
    return pad(tensor, [count for size in reversed(missing) for count in (0, size)], value=value)


def per_task(states: Tensor, weights: Tensor) -> Tensor:
    """The product of each state with its task's matrix.

    Args:
        states: (rows, tokens, in), the rows being images or the windows of images.
        weights: (1 or images, 1 or tokens, in, out).

    Returns:
        (rows, tokens, out).
    """
    weights = fit_rows(weights, states.shape[0]).to(states.dtype)
    if weights.shape[:2] == (1, 1):  # of all, so that images and tokens are rows of one product
        return states @ weights[0, 0]
    if weights.shape[1] == 1:  # of each image, for all its tokens
        return states @ weights.squeeze(1)
    if weights.shape[0] == 1:  # of each token, for all images
        return (states.transpose(0, 1) @ weights.squeeze(0)).transpose(0, 1)
    return torch.einsum("ntd,ntdr->ntr", states, weights)


def fit_rows(spread: Tensor, rows: int) -> Tensor:
    """Repeat what each image has for all rows that a pass has of it (the windows of a windowed backbone).

    What is there once for all images stays so, as it broadcasts.
    """
    images = spread.shape[0]
    return spread if images in (1, rows) else spread.repeat_interleave(rows // images, dim=0)
