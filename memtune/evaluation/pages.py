"""Tables and pictures of a report, and one page that holds them all."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..drawing import new_figure

_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .8rem; border-bottom: 1px solid #ddd }
td:not(:first-child), th:not(:first-child) { text-align: right } img { max-width: 100% }"""

_NAMED = 25
"""Up to so many classes a confusion matrix has their names, and its numbers."""


def short(value: Any) -> str:
    """A value of a table: a float by three decimals."""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in HTML; its texts may be a stranger's."""
    lines = [[html.escape(short(value)) for value in row] for row in rows]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{value}</td>' for value in line)}</tr>" for line in lines)
    return f"<table>{f'<tr>{head}</tr>' if head else ''}{body}</table>"


def picture(title: str, data: bytes) -> str:
    """A PNG in HTML, with its title."""
    encoded = base64.b64encode(data).decode()
    return f'<h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" src="data:image/png;base64,{encoded}">'


def page(title: str, parts: Sequence[str]) -> str:
    """A page that needs no other file."""
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    body = "\n".join([f"<h1>{html.escape(title)}</h1>", *parts])
    return f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n</body>\n</html>\n'


def draw_confusion(confusion: np.ndarray, labels: Sequence[str]) -> bytes:
    """A confusion matrix (true, answered), each row by its share."""
    count = len(labels)
    side = max(4.0, min(0.36 * count + 2, 11.0))
    figure = new_figure(figsize=(side, side))
    axes = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="answered", ylabel="true")
    if count <= _NAMED:
        names = [label if len(label) < 20 else f"{label[:18]}..." for label in labels]
        axes.set_xticks(range(count), names, rotation=90, parse_math=False)
        axes.set_yticks(range(count), names, parse_math=False)
        for row, column in np.argwhere(confusion > 0).tolist():
            shade = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(confusion[row, column]), ha="center", va="center", color=shade, fontsize=8)
    return _png(figure)


def draw_reliability(bins: Sequence[tuple[float, float, int]]) -> bytes:
    """Accuracy over mean confidence, by parts of the range of confidences (and the images in each)."""
    figure = new_figure(figsize=(5, 4.2))
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--", label="as sure as it is right")
    axes.plot([sure for sure, _, _ in bins], [right for _, right, _ in bins], marker="o", label="the answers")
    axes.set(xlabel="mean confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(-0.02, 1.02))
    axes.legend()
    axes.grid(alpha=0.3)
    return _png(figure)


def draw_numbers(true: np.ndarray, answered: np.ndarray, labels: Sequence[str]) -> bytes:
    """What was answered over what is true (images, labels), for the first four labels."""
    shown = min(4, len(labels))
    figure = new_figure(figsize=(4 * shown, 4))
    for place, axes in enumerate(figure.subplots(1, shown, squeeze=False).flat):
        own, given = true[:, place], answered[:, place]
        ends = [min(own.min(), given.min()), max(own.max(), given.max())]
        axes.plot(ends, ends, color="grey", linestyle="--")
        axes.scatter(own, given, s=8, alpha=0.6)
        axes.set(xlabel="true", ylabel="answered")
        axes.set_title(labels[place], parse_math=False)
    return _png(figure)


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, dpi=110, format="png")
    return file.getvalue()
