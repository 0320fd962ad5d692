"""Figures by matplotlib, which is installed only where pictures are wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .errors import ConfigError, MemtuneError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(**options: Any) -> Figure:
    """An empty figure that belongs to no window.

    Args:
        options: Those of matplotlib's `Figure`, such as `figsize`.

    Raises:
        MemtuneError: matplotlib is not installed.
    """
    return _matplotlib("figure").Figure(layout="constrained", **options)


def find_colormap(name: str) -> Any:
    """Matplotlib's colormap of a name, which makes colours (..., 4) of values (...), both from 0 to 1.

    Raises:
        MemtuneError: matplotlib is not installed.
    """
    return _matplotlib("colormaps")[name]


def _matplotlib(part: str) -> Any:
    try:
        import matplotlib.figure
    except ImportError as error:
        raise MemtuneError(
            "pictures need matplotlib, which is not installed: pip install matplotlib, or 'memtune[examples]'"
        ) from error
    return getattr(matplotlib, part)


def check_picture(path: str | Path, option: str) -> None:
    """Raise `ConfigError`, which names the option, if no picture can be written to a path."""
    path, endings = Path(path), new_figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in endings or not path.parent.is_dir():
        raise ConfigError(
            f"{option}: got {str(path)!r}, expected a file in a folder that is there, with one of the endings "
            f"{sorted(endings)}"
        )


def as_picture(values: Any) -> Any:
    """An array (channels, height, width) of any range as a picture from 0 to 1, (height, width[, 3])."""
    low, high = values.min(), values.max()
    scaled = (values - low) / max(high - low, 1e-6)
    return scaled.transpose(1, 2, 0) if len(scaled) == 3 else scaled.mean(axis=0)


def draw_sheet(images: Sequence[tuple[Any, str]], path: str | Path | BinaryIO, columns: int = 4) -> None:
    """Draw images side by side.

    Args:
        images: Each with what stands above it; its lines may be a stranger's, and are shown as they are.
        path: The picture to write, or an open file.
        columns: Images in a row.

    Raises:
        MemtuneError: matplotlib is not installed.
    """
    rows = math.ceil(len(images) / columns)
    lines = max((text.count("\n") + 1 for _, text in images), default=1)
    figure = new_figure(figsize=(2.6 * columns, (2.4 + 0.2 * lines) * max(rows, 1)))
    grid = list(figure.subplots(max(rows, 1), columns, squeeze=False).flat)
    for axes in grid:
        axes.axis("off")
    for axes, (image, text) in zip(grid, images, strict=False):
        axes.imshow(image, cmap="gray")
        axes.set_title(
            "\n".join(line if len(line) < 36 else f"{line[:34]}..." for line in text.split("\n")), fontsize=8
        )
        axes.title.set_parse_math(False)
    figure.savefig(path, dpi=120)
