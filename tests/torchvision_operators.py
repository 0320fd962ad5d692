"""Lets torchvision's Python files be imported beside a build of torch that its compiled ones do not fit.

timm needs torchvision for its image transforms only, none of which calls a compiled operator; but torchvision registers
more for some of these when it is imported, so that they must be there by name. Import this file before torchvision
(`pytest -p torchvision_operators`); where the compiled files fit, it does nothing.
"""

from __future__ import annotations

import contextlib
import sys

import torch


def declare() -> None:
    """Declare what torchvision asks for when it is imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")


with contextlib.suppress(ModuleNotFoundError):
    try:
        import torchvision
    except RuntimeError:  # operator torchvision::nms does not exist
        declare()
        import torchvision  # noqa: F401
