"""Figures by matplotlib, which is installed only where pictures are wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import MemtuneError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(**options: Any) -> Figure:
    """An empty figure that belongs to no window.

    Args:
        options: Those of matplotlib's `Figure`, such as `figsize`.

    Raises:
        MemtuneError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MemtuneError(
            "pictures need matplotlib, which is not installed: pip install matplotlib, or 'memtune[examples]'"
        ) from error
    return Figure(layout="constrained", **options)
