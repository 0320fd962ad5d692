"""How right a model is on a data set, on one device or many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import ImageClassifierOutput

from ..data import IGNORED
from ..errors import InputError
from ..models import TunedModel
from ..preparation import TrainingConfig, borrowed_state, check_items, make_accelerator, make_items, make_loader
from ..trunk_cache import to_pass
from .metrics import Accuracy


def evaluate(
    model: TunedModel,
    dataset: Any,
    config: TrainingConfig | None = None,
    *,
    classes: Sequence[int] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> dict[str, float]:
    """The `accuracy` and mean `loss` of a model on a data set (see `fit`), its mode left as it was.

    Each image counts exactly once, on any number of devices; those labelled -100, and those that are skipped, do not.

    Args:
        model: The model.
        dataset: The images and labels.
        config: The settings.
        classes: Indices of the classes to choose among, as if the head had no others; None for all.
        image_column: As in `TrainingConfig`.
        label_column: The same.

    Raises:
        InputError: The data set, an image or a label is wrong.
    """
    model.task.require_head("evaluate")
    config = (config or TrainingConfig(disable_tqdm=True)).with_columns(image_column, label_column)
    training = model.training
    try:
        with borrowed_state():
            accelerator = make_accelerator(config)
            items = make_items(model, dataset, config)
            check_items(model, items, config)
            loader: Any = accelerator.prepare_data_loader(make_loader(model, items, config, accelerator))
            with accelerator.autocast():
                return measure(accelerator, model.to(accelerator.device), loader, config, classes)
    finally:
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
        kept = labels != IGNORED
        logits, labels = logits[kept], labels[kept]
        if classes is not None:
            chosen = torch.tensor(classes, device=logits.device)
            logits = torch.full_like(logits, -torch.inf).index_copy(1, chosen, logits[:, chosen])
        if len(labels):
            accuracy.add_batch(predictions=logits.argmax(dim=-1).cpu(), references=labels.cpu())
        losses.append(cross_entropy(logits, labels, reduction="none").cpu())
    if not sum(map(len, losses)):
        raise InputError(f"no image of the data set has a label to measure by: all are skipped, or labelled {IGNORED}")
    scores = accuracy.compute()
    assert scores is not None
    return {"accuracy": scores["accuracy"], "loss": torch.cat(losses).mean().item()}
