"""Merged adapters: equal to what PEFT merges of the same adapters, and refused where they do not go together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from backbone_zoo import BY_NAME
from multitask import tune
from safetensors.torch import load_file, save_file

import memtune
from memtune import LoraConfig, MemoryConfig, TunedModel
from memtune.errors import BackboneMismatchError, CheckpointError, ConfigError
from memtune.models.arithmetic import WAYS, merge_adapters
from memtune.models.peft_folders import export_peft

VIT = BY_NAME["vit-head"]
ROLES = ("query", "value", "fc1")


def tuned(backbone: Any, seed: int, *, masked: bool = False, labels: int = 3, **settings: Any) -> TunedModel:
    settings = {"r": 3, "lora_alpha": 2 + seed, "roles": ROLES} | settings
    return tune(backbone, LoraConfig(**settings), masked=masked, labels=labels, seed=seed)


def without_head(folder: Path) -> None:
    """PEFT merges no adapters that have heads of their own."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": None}))
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if "classifier" not in key}
    save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def merged_by_peft(adapters: list[TunedModel], folder: Path, head: TunedModel, *arguments: Any, **options: Any) -> Any:
    """The logits of images by PEFT's own merged adapter, with a head of memtune."""
    names = [str(number) for number in range(len(adapters))]
    for name, adapter in zip(names, adapters, strict=True):
        export_peft(adapter, folder / name)
        without_head(folder / name)
    model = peft.PeftModel.from_pretrained(VIT.build(), folder / "0", adapter_name="0")
    for name in names[1:]:
        model.load_adapter(folder / name, adapter_name=name)
    torch.manual_seed(5)
    model.add_weighted_adapter(names, *arguments, adapter_name="merged", **options)
    model.set_adapter("merged")
    plain = model.eval().base_model.model
    plain.classifier = head.task.head
    with torch.no_grad():
        return plain(VIT.images()).logits


def options_of(how: str) -> dict[str, Any]:
    return {} if how in ("svd", "linear", "cat") else {"density": 0.6}


@pytest.mark.parametrize(
    ("how", "weights"), [(how, [1.5, -0.5]) for how in WAYS] + [(how, [0.7, 0.4]) for how in ("linear", "ties")]
)
@pytest.mark.slow
def test_the_same_as_pefts(how: str, weights: list[float], tmp_path: Path) -> None:
    backbone = VIT.build()
    adapters = [tuned(backbone, seed) for seed in range(2)]
    merged = merge_adapters(adapters, weights, head=1, how=how, seed=5, **options_of(how))
    expected = merged_by_peft(adapters, tmp_path, adapters[1], weights, combination_type=how, **options_of(how))
    torch.testing.assert_close(merged(VIT.images()).logits, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, adapters[1](VIT.images()).logits, atol=1e-3)


@pytest.mark.parametrize("settings", [{"how": "svd", "svd_rank": 2}, {"how": "cat"}, {"how": "svd"}], ids=str)
def test_adapters_of_several_ranks_and_scales(settings: dict[str, Any], tmp_path: Path) -> None:
    backbone = VIT.build()
    adapters = [tuned(backbone, seed, r=r) for seed, r in enumerate((2, 4, 1))]
    merged = merge_adapters(adapters, [1, 2, 3], head=0, **settings)
    options = {"combination_type": settings["how"], "svd_rank": settings.get("svd_rank")}
    expected = merged_by_peft(adapters, tmp_path, adapters[0], [1, 2, 3], **options)
    torch.testing.assert_close(merged(VIT.images()).logits, expected, atol=1e-5, rtol=1e-5)
    assert merged.task.configs[0].r == {"cat": 7, "svd": settings.get("svd_rank", 4)}[settings["how"]]


def updates(model: TunedModel) -> dict[str, torch.Tensor]:
    """Each place's s B A."""
    (config,), tensors = model.task.configs, model.task.tensors()
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    places = [key.removesuffix(".lora_A") for key in tensors if key.endswith(".lora_A")]
    return {place: scale * tensors[f"{place}.lora_B"] @ tensors[f"{place}.lora_A"] for place in places}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rslora", [(False, True), (True, True)], ids=str)
def test_cat_is_the_sum_of_the_updates(masked: bool, rslora: tuple[bool, bool]) -> None:
    backbone = VIT.build()
    one, two = (tuned(backbone, seed, masked=masked, r=2 + seed, use_rslora=rslora[seed]) for seed in range(2))
    merged = merge_adapters([one, two], [0.25, -2], head=0, how="cat")
    for place, update in updates(merged).items():
        torch.testing.assert_close(update, 0.25 * updates(one)[place] - 2 * updates(two)[place], atol=1e-5, rtol=1e-5)
    if masked:
        start = backbone.vit.embeddings.cls_token
        first, second = one.task.class_token, two.task.class_token
        expected = start + 0.25 * (first - start) - 2 * (second - start)
        torch.testing.assert_close(merged.task.class_token, expected, atol=1e-5, rtol=1e-5)


def test_without_a_class_token_of_the_backbone_the_tokens_mean_is_taken() -> None:
    backbone = BY_NAME["siglip-head"].build()
    adapters = [tuned(backbone, seed, masked=True) for seed in range(2)]
    merged = merge_adapters(adapters, head=0, how="linear")
    mean = (adapters[0].task.class_token + adapters[1].task.class_token) / 2
    torch.testing.assert_close(merged.task.class_token, mean)


@pytest.mark.parametrize("how", ["svd", "cat"])
def test_an_adapter_merged_with_itself_stays_as_it_is(how: str) -> None:
    adapter = tuned(VIT.build(), 1)
    merged = merge_adapters([adapter, adapter], head="mean", how=how)
    torch.testing.assert_close(merged(VIT.images()).logits, adapter(VIT.images()).logits, atol=1e-5, rtol=1e-5)


def test_ties_averages_what_agrees() -> None:
    adapter = tuned(VIT.build(), 1)
    merged = merge_adapters([adapter, adapter], head="mean", how="ties_svd", density=0.7)
    for place, update in updates(merged).items():
        own = updates(adapter)[place]
        least = own.abs().flatten().topk(int(0.7 * own.numel())).values[-1]
        kept = own * (own.abs() >= least)
        left, sizes, right = torch.linalg.svd(kept)
        torch.testing.assert_close(update, left[:, :3] * sizes[:3] @ right[:3], atol=1e-5, rtol=1e-4)


def test_a_single_adapter_is_scaled() -> None:
    adapter = tuned(VIT.build(), 1)
    merged = merge_adapters([adapter], [-0.5], head=0, how="linear")
    for place, update in updates(merged).items():
        torch.testing.assert_close(update, -0.5 * updates(adapter)[place])


# Heads.


def heads(labels: list[list[str]]) -> list[TunedModel]:
    backbone = VIT.build()
    adapters = [memtune.wrap(backbone, LoraConfig(r=2), labels=names).eval() for names in labels]
    for adapter in adapters:
        torch.nn.init.normal_(adapter.task.head.weight)
        torch.nn.init.normal_(adapter.task.head.bias)
    return adapters


def test_the_head_of_one() -> None:
    adapters = heads([["cat", "dog"], ["rose", "tulip", "lily"]])
    for number, adapter in enumerate(adapters):
        merged = merge_adapters(adapters, head=number)
        assert merged.task.labels == adapter.task.labels
        assert merged.config.id2label == dict(enumerate(adapter.task.labels))
        assert torch.equal(merged.task.head.weight, adapter.task.head.weight)
        assert torch.equal(merged.task.head.bias, adapter.task.head.bias)


def test_the_mean_of_heads_goes_by_label() -> None:
    one, two = heads([["cat", "dog", "cow"], ["cow", "cat", "dog"]])
    merged = merge_adapters([one, two], [3, 1], head="mean")
    assert merged.task.labels == ["cat", "dog", "cow"]
    for name in ("weight", "bias"):
        first, second = (getattr(each.task.head, name) for each in (one, two))
        torch.testing.assert_close(getattr(merged.task.head, name), 0.75 * first + 0.25 * second[[1, 2, 0]])


def test_heads_side_by_side() -> None:
    one, two = heads([["cat", "dog"], ["rose", "tulip", "lily"]])
    merged = merge_adapters([one, two], head="concat")
    assert merged.task.labels == ["cat", "dog", "rose", "tulip", "lily"]
    assert torch.equal(merged.task.head.weight, torch.cat([one.task.head.weight, two.task.head.weight]))
    assert torch.equal(merged.task.head.bias, torch.cat([one.task.head.bias, two.task.head.bias]))


# Folders.


@pytest.mark.parametrize("masked", [False, True])
def test_folders_give_what_models_give_and_the_result_is_saved(masked: bool, tmp_path: Path) -> None:
    backbone = VIT.build()
    adapters = [tuned(backbone, seed, masked=masked) for seed in range(2)]
    folders = [tmp_path / str(number) for number in range(2)]
    for adapter, folder in zip(adapters, folders, strict=True):
        adapter.save_pretrained(folder)
    before = [adapter.task.digest() for adapter in adapters]
    merged = merge_adapters(adapters, head=0, how="dare_ties", density=0.5)
    from_folders = merge_adapters(folders, head=0, how="dare_ties", density=0.5, backbone=backbone)
    other_seed = merge_adapters(folders, head=0, how="dare_ties", density=0.5, backbone=backbone, seed=1)
    assert merged.task.digest() == from_folders.task.digest() != other_seed.task.digest()
    assert [adapter.task.digest() for adapter in adapters] == before
    merged.save_pretrained(tmp_path / "merged")
    loaded = memtune.load(tmp_path / "merged", backbone)
    assert torch.equal(loaded(VIT.images()).logits, merged(VIT.images()).logits)
    assert torch.isfinite(loaded(VIT.images()).logits).all()


def test_the_backbone_is_loaded_by_its_recorded_name(tmp_path: Path) -> None:
    VIT.build().save_pretrained(tmp_path / "backbone")
    backbone = type(VIT.build()).from_pretrained(tmp_path / "backbone")
    for seed in range(2):
        tuned(backbone, seed).save_pretrained(tmp_path / str(seed))
    merged = merge_adapters([tmp_path / "0", tmp_path / "1"], head=0)
    assert merged.backbone is not backbone
    expected = merge_adapters([tmp_path / "0", tmp_path / "1"], head=0, backbone=backbone)
    torch.testing.assert_close(merged(VIT.images()).logits, expected(VIT.images()).logits)


# Bad input.


def test_bad_settings_are_refused() -> None:
    backbone = VIT.build()
    good = [tuned(backbone, seed) for seed in range(2)]
    for adapters, settings, message in [
        ([], {}, "expected a sequence of folders"),
        ("folder", {}, "expected a sequence of folders"),
        (good, {"how": "dare"}, "how: got 'dare', expected one of"),
        (good[:1], {"how": "svd"}, "can only be scaled"),
        (good, {"how": "ties"}, "density: got None; 'ties' needs"),
        (good, {"how": "ties", "density": 0}, "density: got 0"),
        (good, {"how": "ties", "density": 1.5}, "density: got 1.5"),
        (good, {"density": 0.5}, "'svd' drops no values"),
        (good, {"how": "linear", "svd_rank": 2}, "makes no decomposition"),
        (good, {"svd_rank": 0}, "svd_rank: got 0"),
        (good, {"majority_sign_method": "vote"}, "majority_sign_method: got 'vote'"),
        (good, {"weights": [1]}, "expected 2 finite numbers"),
        (good, {"weights": [1, float("nan")]}, "expected 2 finite numbers"),
        (good, {"weights": "ab"}, "expected 2 finite numbers"),
        (good, {"head": 2}, "head: got 2, expected an adapter's number below 2"),
        (good, {"head": "first"}, "head: got 'first'"),
        (good, {"head": "concat"}, "more than one adapter has the labels"),
        (good, {"head": "mean", "weights": [1, -1]}, "have no mean"),
        ([3], {"how": "linear"}, "got int"),
        ([good[0], 3], {}, "adapter 1: got int"),
    ]:
        with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
            merge_adapters(adapters, **({"head": 0} | settings))


def test_adapters_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    backbone = VIT.build()
    good = tuned(backbone, 0)
    extending = memtune.wrap(
        backbone,
        LoraConfig(r=3, roles=ROLES),
        num_labels=3,
        masked=True,
        extends=memtune.combine(backbone, {"first": tuned(backbone, 1, masked=True)}),
    )
    for other, settings, message in [
        (tuned(backbone, 1, masked=True), {}, "masked: got adapters with"),
        (tuned(backbone, 1, roles=("query",)), {}, "roles: got adapters with"),
        (tuned(backbone, 1, blocks=(0,)), {}, "blocks: got adapters with"),
        (tuned(backbone, 1, r=2), {"how": "linear"}, "merged by 'svd' and 'cat'"),
        (tuned(backbone, 1, use_dora=True), {}, "with DoRA"),
        (tune(backbone, MemoryConfig(2), masked=False), {}, "memory"),
        (tune(backbone, [LoraConfig(r=2), MemoryConfig(2)], masked=False), {}, "memory"),
        (extending, {}, "extend other tasks"),
        (tuned(backbone, 1, labels=4), {"head": "mean"}, "expected the same for all adapters"),
    ]:
        with pytest.raises(ConfigError, match=message):
            merge_adapters([good, other], **({"head": 0} | settings))
    with pytest.raises(BackboneMismatchError, match="adapter 1: "):
        merge_adapters([good, tuned(VIT.build(seed=1), 1)], head=0)
    with pytest.raises(CheckpointError, match="adapter 1: "):
        merge_adapters([good, tmp_path], head=0)


def test_blocks_may_be_named_in_several_ways() -> None:
    backbone = VIT.build()
    merged = merge_adapters([tuned(backbone, 0), tuned(backbone, 1, blocks=(-1, 0))], head=0)
    assert len(updates(merged)) == 2 * len(ROLES)
