"""What Hugging Face's tools (pipelines, trainers, evaluators) ask of a vision model beside its pass."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel


class VisionModel(nn.Module):
    """A model around a frozen backbone, known to those tools as a vision model.

    Attributes:
        backbone: The frozen model.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)

    backbone: PreTrainedModel

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """The backbone's type of numbers; an adapter's own parameters may be of another."""
        return self.backbone.dtype

    def can_generate(self) -> bool:
        """Whether it writes text: no."""
        return False
