"""Pictures of attention: `Explanation.save` and `MemoryUsage.save`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ..drawing import find_colormap, new_figure
from .shares import Attention

_COLOURS = {
    "patches": "#4c78a8",
    "own": "#9ecae9",
    "class_token": "#b8b0ac",
    "registers": "#7c7673",
    "earlier": "#72b7b2",
    "memory": "#f58518",
    "further": "#e45756",
}
_HEAT = "magma"
_BLOCKS_IN_A_ROW = 6
_BRIGHTEST = 0.98
"""The share of the patches that are not shown as the brightest."""

_VEIL = 0.65
"""How much of a picture is attention, and not the image below it."""

_SMALLEST = 224
"""Pixels that a picture of attention has at least along its shorter side."""

_MOST_NUMBERS = 12
"""With more cells than this along one side, a heat map has no numbers in its cells."""


def token_name(masked: bool) -> str:
    """What the token is called whose attention is shown."""
    return "task token" if masked else "class token"


def draw_explanation(
    path: str | Path | BinaryIO,
    image: Tensor,
    blocks: Sequence[Attention],
    *,
    masked: bool,
    title: str | None,
    sides: Sequence[float] = (),
) -> None:
    """Draw an image, each block's attention over it, and what the attention of each block falls on.

    Args:
        path: The picture's file.
        image: The image, (height, width, 3), from 0 to 1.
        blocks: The attention in each block, the mean over its heads.
        masked: Whether it is a task token's; else it is the class token's.
        title: What stands over the image.
        sides: Of a task with a side network its part in what the token takes in each block, from 0 to 1.

    Raises:
        MemtuneError: matplotlib is not installed.
    """
    rows = math.ceil(len(blocks) / _BLOCKS_IN_A_ROW)
    most = max(len(block.memory) for block in blocks)
    upper = max(3.4, 1.75 * rows)
    figure: Any = new_figure(figsize=(16, upper + _lower_height(most)))
    above, below = figure.subfigures(2, 1, height_ratios=[upper, _lower_height(most)])
    left, right = above.subfigures(1, 2, width_ratios=[1.9, 3.1])
    plain, over = left.subplots(1, 2)
    for axes in (plain, over):
        axes.axis("off")
    plain.imshow(image.numpy())
    plain.set_title("the image" if title is None else title, fontsize=12, fontweight="bold")
    over.imshow(overlay(image, mean_attention(blocks)))
    over.set_title("where it looks: mean of all blocks", fontsize=10)
    grid = list(right.subplots(rows, min(len(blocks), _BLOCKS_IN_A_ROW), squeeze=False).flat)
    for each in grid:
        each.axis("off")
    for index, (each, block) in enumerate(zip(grid, blocks, strict=False)):
        each.imshow(overlay(image, block.patches))
        each.set_title(f"block {index}: {float(block.patches.sum()):.0%}", fontsize=9)
    right.suptitle(
        f"Each block: attention of the {token_name(masked)} to the patches, and their share of all its attention",
        fontsize=10,
    )
    _draw_lower(below, blocks, masked, most, sides)
    figure.savefig(path, dpi=130)


def draw_usage(path: str | Path, blocks: Sequence[Attention], *, masked: bool, images: int) -> None:
    """Draw the mean attention to each memory token as a heat map, beside what the attention of each block falls on.

    Args:
        path: The picture's file.
        blocks: The mean attention in each block.
        masked: Whether it is a task token's; else it is the class token's.
        images: How many images it is the mean over.

    Raises:
        MemtuneError: matplotlib is not installed.
    """
    most = max(len(block.memory) for block in blocks)
    figure = new_figure(figsize=(13, _lower_height(most) + 0.3))
    figure.suptitle(f"Mean over {images} images", fontsize=10)
    _draw_lower(figure, blocks, masked, most)
    figure.savefig(path, dpi=130)


def _lower_height(tokens: int) -> float:
    """Inches for a heat map of so many memory tokens."""
    return min(5.0, max(3.0, 1.6 + 0.2 * tokens))


def mean_attention(blocks: Sequence[Attention]) -> Tensor:
    """The mean over the blocks of how the attention is divided among the patches, (rows, columns); it sums to 1."""
    parts = [block.patches / block.patches.sum().clamp_min(1e-12) for block in blocks]
    return torch.stack(parts).mean(dim=0)


def overlay(image: Tensor, patches: Tensor) -> Image.Image:
    """An image in dark grey, with the attention to its patches as a veil: bright where it is, dark where it is not.

    The colours go by the square root up to the 98th percentile: a few patches often get most of the attention.

    Args:
        image: The image, (height, width, 3), from 0 to 1.
        patches: The attention to each patch, (rows, columns).

    Raises:
        MemtuneError: matplotlib is not installed.
    """
    share = (patches / patches.quantile(_BRIGHTEST).clamp_min(1e-12)).clamp_max(1).sqrt()
    size = [-(-_SMALLEST // min(image.shape[:2])) * side for side in image.shape[:2]]  # small images are enlarged
    share, grey = (
        interpolate(part[None, None], size, mode="bilinear", align_corners=False)[0, 0].clamp(0, 1)
        for part in (share, image.mean(dim=-1))
    )
    veil = torch.from_numpy(find_colormap(_HEAT)(share.numpy())[..., :3])
    mixed = _VEIL * veil + (1 - _VEIL) * grey[..., None] / 2  # dark, or a white wall would look like attention
    return Image.fromarray((255 * mixed).round().to(torch.uint8).numpy())


def _draw_lower(figure: Any, blocks: Sequence[Attention], masked: bool, most: int, sides: Sequence[float] = ()) -> None:
    """What the attention of each block falls on; and where there are memory tokens, the share of each of them."""
    if not most:
        _draw_shares(figure.subplots(), blocks, masked, sides)
        return
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.25])
    _draw_shares(left, blocks, masked, sides)
    _draw_memory(right, blocks, most)


def _draw_shares(axes: Any, blocks: Sequence[Attention], masked: bool, sides: Sequence[float]) -> None:
    """A bar for each block, stacked of what its attention falls on; and a line for a side network's part."""
    names = {"own": f"the {token_name(masked)} itself", "class_token": "the backbone's class token"}
    names |= {"earlier": "earlier tasks", "further": "further keys"}
    numbers = range(len(blocks))
    shares = [block.shares() for block in blocks]
    bottom = [0.0] * len(blocks)
    for name, colour in _COLOURS.items():
        heights = [100 * float(share[name]) for share in shares]
        if any(getattr(block, name).numel() for block in blocks):
            axes.bar(numbers, heights, bottom=bottom, color=colour, width=0.82, label=names.get(name, name))
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    if sides:
        of_all = [100 * side for side in sides]
        axes.plot(numbers, of_all, "o-", color="black", lw=1, ms=3, label="side network's part in the values")
    axes.set(xlabel="block", ylabel="share of the attention, %", ylim=(0, 100), xlim=(-0.6, len(blocks) - 0.4))
    axes.set_xticks(numbers)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=4, fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _draw_memory(axes: Any, blocks: Sequence[Attention], most: int) -> None:
    """A heat map with a column for each block and a row for each memory token; a block without memory stays empty."""
    cells = [
        [100 * float(block.memory[token]) if token < len(block.memory) else math.nan for block in blocks]
        for token in range(most)
    ]
    from matplotlib.colors import PowerNorm  # the figure is there, so it is installed

    image = axes.imshow(cells, cmap=_HEAT, norm=PowerNorm(0.5, vmin=0), aspect="auto")
    if max(most, len(blocks)) <= _MOST_NUMBERS:
        for token, row in enumerate(cells):
            for block, value in enumerate(row):
                colour = "black" if image.norm(value) > 0.65 else "white"
                if not math.isnan(value):
                    axes.text(block, token, _short(value), ha="center", va="center", fontsize=8, color=colour)
    axes.set(xlabel="block", ylabel="memory token", xticks=range(len(blocks)))
    axes.set_title("attention to each memory token, %", fontsize=10)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.figure.colorbar(image, ax=axes, shrink=0.9, pad=0.02)


def _short(percent: float) -> str:
    return f"{percent:.0f}" if percent >= 9.95 else f"{percent:.1f}" if percent >= 0.05 else "<0.1"
