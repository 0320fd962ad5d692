"""What one of several processes does in the tests of distributed training: a module to run, not to import.

python tests/distributed_worker.py train OUT      fit each model of `MODELS` twice; the losses and adapters to OUT
python tests/distributed_worker.py evaluate OUT   evaluate a model on an odd number of images
python tests/distributed_worker.py towers OUT     the losses of a model of two towers, with a parameter of one number
python tests/distributed_worker.py refuse OUT     what `fit` says of how it was launched
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from backbone_zoo import BY_NAME
from transformers import ViTConfig, ViTForImageClassification
from transformers.integrations import is_deepspeed_zero3_enabled

import memtune
from memtune.backbones.backbone import Backbone
from memtune.errors import ConfigError
from memtune.training.callbacks import TrainingCallback

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
MODELS = {
    "masked memory": (memtune.MemoryConfig(2), True),
    "unmasked memory": (memtune.MemoryConfig(2), False),
    "masked LoRA": (memtune.LoraConfig(r=2), True),
    "unmasked LoRA": (memtune.LoraConfig(r=2), False),
}
LINEAR = torch.nn.functional.linear
BATCH = 8
"""Images of a micro-batch of all processes together."""


def build():
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**SHAPE, image_size=32, patch_size=8))


def items(count):
    generator = torch.Generator().manual_seed(count)
    images = torch.randn(count, 3, 32, 32, generator=generator)
    return [{"pixel_values": image + index % 3, "labels": index % 3} for index, image in enumerate(images)]


def values_here(parameter):
    """How many of a parameter's values this process has; DeepSpeed's are empty while there is a shard alone."""
    if hasattr(parameter, "ds_tensor"):
        return max(parameter.numel(), parameter.ds_tensor.numel())
    return getattr(parameter, "_local_tensor", parameter).numel()


class Shards(TrainingCallback):
    """Notes how many of the backbone's values this process has in a step."""

    def __init__(self):
        self.values = 0

    def on_step_end(self, model):
        self.values = sum(values_here(parameter) for parameter in model.backbone.parameters())


def settings(folder, processes):
    return memtune.TrainingConfig(
        num_train_epochs=3,
        per_device_train_batch_size=BATCH // processes,
        gradient_accumulation_steps=2,
        learning_rate=0.02,
        max_grad_norm=0.5,
        ema_decay=0.5,
        load_best_model_at_end=True,
        save_strategy="epoch",
        output_dir=str(folder),
        disable_tqdm=True,
    )


def train(out):
    results = {}
    for name, (config, masked) in MODELS.items():
        folder = out / name.replace(" ", "_")
        torch.manual_seed(int(os.environ.get("RANK", 0)))  # the adapters start alike all the same
        model = memtune.wrap(build(), config, num_labels=3, masked=masked)
        if not masked:
            model.activation_checkpointing_enable()
        before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        shards, run = Shards(), settings(folder / "run", processes)
        result = memtune.fit(model, items(48), items(9), run, callbacks=[shards])
        resumed = memtune.wrap(build(), config, num_labels=3, masked=masked)
        if not masked:
            resumed.activation_checkpointing_enable()
        again = memtune.fit(
            resumed,
            items(48),
            items(9),
            run,
            resume_from_checkpoint=folder / "run" / "checkpoint-3",
            callbacks=[Shards()],
        )
        deepspeed = PartialState().distributed_type == DistributedType.DEEPSPEED  # with which it is refused
        other = memtune.TrainingConfig(mixed_precision="no" if deepspeed else "bf16", disable_tqdm=True)
        after = model.backbone.state_dict()
        kept = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        results[name] = {
            "history": [{key: entry[key] for key in ("loss", "eval_loss")} for entry in result.history],
            "resumed": [{key: entry[key] for key in ("loss", "eval_loss")} for entry in again.history],
            "evaluated": memtune.evaluate(model, items(9))["loss"],
            "in bf16": memtune.evaluate(model, items(9), other)["loss"],
            "share": shards.values / sum(parameter.numel() for parameter in model.backbone.parameters()),
            "digest": model.task.digest(),
            "kept": kept and torch.nn.functional.linear is LINEAR and not is_deepspeed_zero3_enabled(),
            "depth": Backbone(model.backbone).depth,
            "distributed_type": PartialState().distributed_type.value,
        }
        if PartialState().is_main_process:
            model.save_pretrained(folder)
    return results


def evaluate(out):
    model = memtune.wrap(build(), memtune.MemoryConfig(2), num_labels=3, masked=True)
    torch.manual_seed(1)
    torch.nn.init.normal_(model.task.require_head("").weight)
    config = memtune.TrainingConfig(per_device_eval_batch_size=4, disable_tqdm=True)
    return {str(count): memtune.evaluate(model, items(count), config) for count in (21, 17, 3)}


def towers(out):
    case = BY_NAME["clip-two-towers"]
    torch.manual_seed(0)
    model = memtune.wrap(case.build(), memtune.MemoryConfig(2), num_labels=3, masked=True)
    batch = BATCH // int(os.environ.get("WORLD_SIZE", "1"))
    run = memtune.TrainingConfig(num_train_epochs=2, per_device_train_batch_size=batch, disable_tqdm=True)
    result = memtune.fit(model, items(16), items(3), run)
    return [[entry["loss"], entry["eval_loss"]] for entry in result.history]


def refuse(out):
    model = memtune.wrap(build(), memtune.MemoryConfig(2), num_labels=3)
    try:
        memtune.fit(model, items(8), config=memtune.TrainingConfig(max_steps=1, disable_tqdm=True))
    except ConfigError as error:
        return {"error": str(error)}
    return {"error": None}


if __name__ == "__main__":
    if "ACCELERATE_TORCH_DEVICE" in os.environ:
        # Accelerate offers FSDP and DeepSpeed on GPUs alone: let it take the CPU and gloo for them.
        PartialState._prepare_backend = lambda *arguments, **options: ("gloo", DistributedType.MULTI_GPU)
    what, out = sys.argv[1], Path(sys.argv[2])
    results = {"train": train, "evaluate": evaluate, "towers": towers, "refuse": refuse}[what](out)
    (out / f"results_{os.environ.get('RANK', 0)}.json").write_text(json.dumps(results))
