"""A picture of images with what each task says of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..drawing import new_figure
from ..errors import ConfigError
from ..storage import decode


def check_sheet(path: Path, option: str = "--sheet") -> None:
    """Raise `ConfigError`, which names the option, if no picture can be written to a path."""
    endings = new_figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in endings or not path.parent.is_dir():
        raise ConfigError(
            f"{option}: got {str(path)!r}, expected a file in a folder that is there, with one of the endings "
            f"{sorted(endings)}"
        )


def draw_sheet(answers: Sequence[Mapping[str, Any]], path: Path, columns: int = 4) -> None:
    """Draw images with the best answers of each task below them.

    Args:
        answers: For each image `image`, its path, and `tasks`: for each task its best labels with probabilities.
        path: The PNG to write.
        columns: Images side by side.

    Raises:
        MemtuneError: matplotlib is not installed.
    """
    rows = math.ceil(len(answers) / columns)
    figure = new_figure(figsize=(2.6 * columns, (2.6 + 0.25 * len(answers[0]["tasks"])) * rows))
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid:
        axes.axis("off")
    for axes, answer in zip(grid, answers, strict=False):
        axes.imshow(decode(answer["image"]))
        lines = [f"{task}: {best[0][0]} ({best[0][1]:.0%})" for task, best in answer["tasks"].items()]
        axes.set_title("\n".join(lines), fontsize=8)
    figure.savefig(path, dpi=120)
