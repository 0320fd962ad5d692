"""A small version of docs/results.md: on real images, more is learnt the more the adapter may change."""

from dataclasses import replace

import datasets
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

import memtune
from memtune.data.images import as_items

pytestmark = [pytest.mark.slow, pytest.mark.shared]

PIXELS = 96
SETTINGS = memtune.TrainingConfig(
    num_train_epochs=5, learning_rate=1e-2, image_size=PIXELS, seed=0, mixed_precision="bf16", disable_tqdm=True
)
VARIANTS = {
    "head": {"config": memtune.MemoryConfig(tokens=0, class_token=False)},
    "masked": {"config": memtune.MemoryConfig(tokens=4), "masked": True},
    "unmasked": {"config": memtune.MemoryConfig(tokens=4)},
}


def traffic_signs(folder, split, count, processor):
    images = datasets.load_dataset("imagefolder", data_dir=folder / "gtsrb" / split, split="train")
    items = as_items(images.shuffle(seed=0).select(range(count)), processor, PIXELS, "raise")
    return [items[index] for index in range(count)]


def test_head_then_masked_then_unmasked(shared_models, shared_data, tmp_path):
    name = shared_models / "vit-tiny-patch16-224"
    backbone = AutoModelForImageClassification.from_pretrained(name, attn_implementation="eager")
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    processor = AutoImageProcessor.from_pretrained(name)
    train = traffic_signs(shared_data, "train", 1000, processor)
    test = traffic_signs(shared_data, "test", 300, processor)
    accuracy = {}
    for variant, options in VARIANTS.items():
        torch.manual_seed(0)
        model = memtune.wrap(backbone, num_labels=43, **options)
        cached = {} if variant == "unmasked" else {"trunk_cache": tmp_path}
        memtune.fit(model, train, config=replace(SETTINGS, **cached))
        accuracy[variant] = memtune.evaluate(model, test, SETTINGS)["accuracy"]
    assert accuracy["head"] < accuracy["masked"], accuracy
    assert accuracy["masked"] + 0.05 < accuracy["unmasked"], accuracy
    assert all(torch.equal(tensor, before[key]) for key, tensor in backbone.state_dict().items())
