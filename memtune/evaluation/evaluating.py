"""How right a model is on a data set, on one device or many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import ImageClassifierOutput

from ..models import TunedModel
from ..preparation import TrainingConfig, make_accelerator, make_loader, prepare_to_evaluate, release
from ..trunk_cache import to_pass
from .metrics import Accuracy


def evaluate(
    model: TunedModel, dataset: Any, config: TrainingConfig | None = None, *, classes: Sequence[int] | None = None
) -> dict[str, float]:
    """The `accuracy` and mean `loss` of a model on a data set (see `fit`), its mode left as it was.

    Each image counts exactly once, on any number of devices.

    Args:
        model: The model.
        dataset: The images and labels.
        config: The settings.
        classes: Indices of the classes to choose among, as if the head had no others; None for all.
    """
    model.task.require_head("evaluate")
    config = config or TrainingConfig(disable_tqdm=True)
    accelerator = make_accelerator(config)
    loader = make_loader(model, dataset, config, accelerator)
    prepared, loader = prepare_to_evaluate(accelerator, model, loader)
    training = model.training
    try:
        return measure(accelerator, prepared, loader, config, classes)
    finally:
        release(accelerator, prepared)
        if training:
            model.train()


def run_batch(model: nn.Module, batch: dict[str, Any], config: TrainingConfig) -> ImageClassifierOutput:
    """A model's output, with float32 logits, for a batch of images or of what a trunk cache has of them."""
    if "trunk" in batch:
        outputs = model(trunk=to_pass(batch["trunk"]))
    else:
        outputs = model(pixel_values=batch["pixel_values"], interpolate_pos_encoding=config.image_size is not None)
    outputs.logits = outputs.logits.float()
    return outputs


@torch.no_grad()
def measure(
    accelerator: Accelerator,
    model: nn.Module,
    loader: Any,
    config: TrainingConfig,
    classes: Sequence[int] | None = None,
) -> dict[str, float]:
    """The same for what Accelerate has prepared; leaves the model in evaluation mode."""
    model.eval()
    accuracy, losses = Accuracy(), []
    for batch in loader:
        logits = run_batch(model, batch, config).logits
        logits, labels = accelerator.gather_for_metrics((logits, batch["labels"]))
        if classes is not None:
            chosen = torch.tensor(classes, device=logits.device)
            logits = torch.full_like(logits, -torch.inf).index_copy(1, chosen, logits[:, chosen])
        accuracy.add_batch(predictions=logits.argmax(dim=-1).cpu(), references=labels.cpu())
        losses.append(cross_entropy(logits, labels, reduction="none").cpu())
    scores = accuracy.compute()
    assert scores is not None
    return {"accuracy": scores["accuracy"], "loss": torch.cat(losses).mean().item()}
