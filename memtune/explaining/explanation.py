"""What a model looks at: the attention of the token that its head reads, for one image or over a data set.

The weights, and the answer beside them, are those of one and the same pass (see `memtune.explaining.observation`).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from ..data import Collator, as_items
from ..errors import ConfigError
from ..models import MultiTaskModel, TunedModel
from ..tasks import Regression, check_images
from .observation import Observer
from .pictures import draw_explanation, draw_usage, mean_attention, overlay, token_name
from .shares import Attention


@dataclass(frozen=True)
class Explanation:
    """What a task's token attended to when it answered for one image. Made by `explain`.

    Attributes:
        labels: The task's labels; none if it has no head.
        probabilities: Their probabilities, (classes,); of a task of numbers these.
        heads: For each block the weights of each head, with the shapes (heads, ...).
        image: The image as the model saw it, (height, width, 3), from 0 to 1.
        masked: Whether the token is a task token; else it is the class token.
        numbers: Whether the task gives numbers, of which none is the answer.
        sides: Of a task with a side network: for each block and head the part of its states in what the token takes of
            the values, by patch, (heads, rows, columns); the sum is the part of all that it takes. Else empty.
    """

    labels: list[str]
    probabilities: Tensor
    heads: list[Attention]
    image: Tensor
    masked: bool
    numbers: bool = False
    sides: list[Tensor] = field(default_factory=list)

    @cached_property
    def blocks(self) -> list[Attention]:
        """For each block the mean over its heads."""
        return [block.apply(lambda part: part.mean(dim=0)) for block in self.heads]

    @property
    def label(self) -> str | None:
        """The answer; None if the task has no head, or gives numbers."""
        return self.labels[int(self.probabilities.argmax())] if self.labels and not self.numbers else None

    @property
    def probability(self) -> float | None:
        """The probability of the answer."""
        return float(self.probabilities.max()) if self.label is not None else None

    def _repr_png_(self) -> bytes:
        file = BytesIO()
        self.save(file)
        return file.getvalue()

    def overlay(self, block: int | None = None) -> Image.Image:
        """The image with the attention to its patches over it, as one picture.

        Args:
            block: The block whose attention it is; None for the mean of all.

        Raises:
            MemtuneError: matplotlib is not installed.
        """
        return overlay(self.image, mean_attention(self.blocks) if block is None else self.blocks[block].patches)

    def save(self, path: str | Path | BinaryIO) -> None:
        """Draw the image, each block's attention over it, and where else the attention went.

        Args:
            path: The picture's file; its ending says the format (.png, .svg, .pdf).

        Raises:
            MemtuneError: matplotlib is not installed.
        """
        title = None if self.label is None else f"{self.label}\n{self.probability:.1%}"
        if self.numbers:
            values = self.probabilities.tolist()
            title = "\n".join(f"{label} {values[place]:.4g}" for place, label in enumerate(self.labels[:4]))
        sides = [float(side.sum(dim=(1, 2)).mean()) for side in self.sides]
        draw_explanation(path, self.image, self.blocks, masked=self.masked, title=title, sides=sides)


class TokenUse(NamedTuple):
    """How much attention a memory token got: the mean over images and heads, from 0 to 1."""

    block: int
    token: int
    attention: float


@dataclass(frozen=True)
class MemoryUsage:
    """The mean attention of a task's token over a data set; print it to see a table. Made by `memory_usage`.

    Attributes:
        heads: For each block the mean over the images of each head's weights, with the shapes (heads, ...).
        images: Their number.
        masked: Whether the token is a task token; else it is the class token.
    """

    heads: list[Attention]
    images: int
    masked: bool

    @cached_property
    def blocks(self) -> list[Attention]:
        """For each block the mean over images and heads."""
        return [block.apply(lambda part: part.mean(dim=0)) for block in self.heads]

    def rows(self) -> list[dict[str, float]]:
        """A row for each block: `block`; the mean attention to `patches`, `own` ... and `memory 0`, `memory 1` ..."""
        rows = []
        for index, block in enumerate(self.blocks):
            shares = {name: float(share) for name, share in block.shares().items() if name != "memory"}
            tokens = {f"memory {token}": share for token, share in enumerate(block.memory.tolist())}
            rows.append({"block": index, **shares, **tokens})
        return rows

    def least_used(self, number: int = 5) -> list[TokenUse]:
        """The memory tokens that get the least attention, the least used one first."""
        tokens = [
            TokenUse(index, token, share)
            for index, block in enumerate(self.blocks)
            for token, share in enumerate(block.memory.tolist())
        ]
        return sorted(tokens, key=lambda use: use.attention)[:number]

    def save(self, path: str | Path) -> None:
        """Draw the memory tokens of all blocks as a heat map, beside what the attention falls on in each block.

        Args:
            path: The picture's file; its ending says the format (.png, .svg, .pdf).

        Raises:
            MemtuneError: matplotlib is not installed.
        """
        draw_usage(path, self.blocks, masked=self.masked, images=self.images)

    def __str__(self) -> str:
        rows = self.rows()
        names = list(dict.fromkeys(name for row in rows for name in row))
        names = [name for name in names if name == "block" or any(row.get(name) for row in rows)]
        widths = [max(len(name), 6) for name in names]
        heads = (name.rjust(width) for name, width in zip(names, widths, strict=True))
        lines = [f"mean attention of the {token_name(self.masked)} over {self.images} images, %", "  ".join(heads)]
        for row in rows:
            cells = [f"{100 * row[name]:.2f}" if name in row else "" for name in names[1:]]
            lines.append(
                "  ".join(cell.rjust(width) for cell, width in zip([str(row["block"]), *cells], widths, strict=True))
            )
        return "\n".join(lines)


def explain(
    model: TunedModel | MultiTaskModel, image: Any, *, task: str | None = None, interpolate_pos_encoding: bool = False
) -> Explanation:
    """What a model attends to when it answers for an image.

    Example:
        >>> from PIL import Image
        >>> memtune.explain(memtune.load("pets-lora"), Image.open("cat.jpg")).save("look.png")

    Args:
        model: The model; it stays as it is, and in its mode.
        image: A PIL image, which goes through the model's processor, or pixel values (1, channels, height, width).
        task: The task, for a model of several.
        interpolate_pos_encoding: Accept pixel values of another size than the backbone's.

    Raises:
        InputError: It is no image, more than one, or of the wrong size.
        ConfigError: The task is unknown, or missing for a model of several.
        UnsupportedBackboneError: The head reads no token whose attention spans the image.
    """
    observer = Observer(model, task)
    pixel_values = observer.pixel_values(image, interpolate_pos_encoding)
    found = observer.observe(pixel_values, interpolate_pos_encoding)
    return Explanation(
        labels=list(observer.task.labels),
        probabilities=found.probabilities[0],
        heads=[block.apply(lambda part: part[0]) for block in found.blocks],
        image=_shown(pixel_values[0].float().cpu(), observer.processor),
        masked=observer.task.masked,
        numbers=isinstance(observer.task.objective, Regression),
        sides=[part[0] for part in found.sides],
    )


def memory_usage(
    model: TunedModel | MultiTaskModel,
    dataset: Any,
    *,
    task: str | None = None,
    batch_size: int = 32,
    on_error: Literal["raise", "skip"] = "raise",
) -> MemoryUsage:
    """How much attention each memory token of a task gets over a data set, each image with equal weight.

    Args:
        model: The model; it stays as it is, and in its mode.
        dataset: The images and labels, as `fit` takes them; all of one size.
        task: The task, for a model of several.
        batch_size: Images in one pass.
        on_error: What to do with an image that cannot be read: "raise", or "skip" it with a warning.

    Raises:
        InputError: The data set, or an image of it, is wrong.
        ConfigError: The task is unknown or missing, or has no memory tokens.
        UnsupportedBackboneError: The head reads no token whose attention spans the image.
    """
    observer = Observer(model, task)
    if not observer.has_memory:
        raise ConfigError(f"model: got a task of the methods {observer.task.methods}, which has no memory tokens")
    items = as_items(
        dataset,
        observer.processor,
        None,
        on_error,
        labels=observer.task.labels or None,
        channels=observer.backbone.channels,
        objective=observer.task.objective,
    )
    sums: list[Attention] | None = None
    images = 0
    classes = len(observer.task.labels) or sys.maxsize  # without a head a label means nothing
    for batch in DataLoader(items, batch_size=batch_size, collate_fn=Collator(classes, observer.task.objective)):
        interpolate = observer.interpolates(batch["pixel_values"], asked=False)
        pixel_values = check_images(batch["pixel_values"], observer.backbone, interpolate=interpolate)
        found = observer.observe(pixel_values, False).blocks
        images += len(pixel_values)
        added = [block.apply(lambda part: part.double().sum(dim=0)) for block in found]
        sums = added if sums is None else [first + second for first, second in zip(sums, added, strict=True)]
    assert sums is not None  # `as_items` refuses an empty data set
    return MemoryUsage(
        [block.apply(lambda part: (part / images).float()) for block in sums], images, observer.task.masked
    )


def _shown(pixel_values: Tensor, processor: Any) -> Tensor:
    """Pixel values (channels, height, width) as a picture (height, width, 3) from 0 to 1."""
    mean, deviation = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if getattr(processor, "do_normalize", False) and mean is not None and deviation is not None:
        pixel_values = pixel_values * torch.tensor(deviation).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    elif processor is None:  # an unknown scale
        low, high = pixel_values.aminmax()
        pixel_values = (pixel_values - low) / (high - low).clamp_min(torch.finfo(high.dtype).tiny)
    channels = pixel_values if len(pixel_values) == 3 else pixel_values.mean(dim=0, keepdim=True).expand(3, -1, -1)
    return channels.clamp(0, 1).permute(1, 2, 0).contiguous()
