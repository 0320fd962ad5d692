"""PEFT's folders: what is exported PEFT loads, and what PEFT wrote is imported, transformers 4 names included."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import peft
import pytest
import torch
from backbone_zoo import BY_NAME, CASES, assert_same, each, snapshot
from other_releases import install
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from memtune import wrap
from memtune.errors import CheckpointError, ConfigError
from memtune.methods import LoraConfig, MemoryConfig
from memtune.methods.peft_names import locate
from memtune.models.peft_folders import export_peft, import_peft

ROLES = ("query", "key", "value", "out", "fc1", "fc2")
HEADS = ["vit-head", "deit-head", "vit_msn-head", "ijepa-head", "beit-head", "beit-shared-head", "dinov2-head"]
HEADS += ["dinov2_with_registers-head", "siglip-head", "swin-head"]
WITH_HEAD = [BY_NAME[name] for name in HEADS]
KINDS = [
    {"lora_alpha": 5},
    {"use_rslora": True, "lora_alpha": 4},
    {"use_dora": True},
    {"blocks": [1], "roles": ["out"]},
]
VIT = BY_NAME["vit-head"]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "fc1", "fc2"]


def tuned_by_lora(case, backbone=None, **settings):
    config = LoraConfig(**({"r": 3, "roles": ROLES, "init_lora_weights": False} | settings))
    return wrap(backbone or case.build(), config, num_labels=5).eval()


def with_peft(case, folder, num_labels=5):
    """The folder on the backbone, by PEFT and transformers alone."""
    base = folder.parent / "base"
    case.build().save_pretrained(base)
    model = AutoModelForImageClassification.from_pretrained(base, num_labels=num_labels, ignore_mismatched_sizes=True)
    return peft.PeftModel.from_pretrained(model.eval(), folder).eval()


def written_by_peft(case, folder, **settings):
    """A folder that PEFT wrote after some training, and the logits of the model it was written from."""
    settings = {"target_modules": TARGETS, "modules_to_save": ["classifier"], "r": 3} | settings
    trained = peft.get_peft_model(case.build(), peft.LoraConfig(**settings)).eval()
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    if "dinov2" in case.name:  # whose head also reads the mean of the patches
        with torch.no_grad():
            trained.base_model.model.classifier.modules_to_save["default"].weight[:, case.width :] = 0
    trained.save_pretrained(folder)
    return trained(case.images()).logits.detach()


@pytest.mark.parametrize(
    ("case", "settings"),
    [(VIT, settings) for settings in KINDS] + [(case, KINDS[2]) for case in WITH_HEAD if case is not VIT],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_peft_loads_what_is_exported(case, settings, tmp_path):
    tuned = tuned_by_lora(case, **settings)
    before = snapshot(tuned.backbone)
    export_peft(tuned, tmp_path / "adapter")
    assert_same(tuned.backbone, before)
    loaded = with_peft(case, tmp_path / "adapter")
    images = case.images()
    torch.testing.assert_close(loaded(images).logits, tuned(images).logits, atol=1e-6, rtol=1e-6)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(images).logits, tuned(images).logits, atol=1e-5, rtol=1e-5)


@each([BY_NAME[name] for name in ("vit", "dinov2", "swin", "siglip-two-towers", "beit-absolute")])
def test_a_bare_backbone_is_exported_for_its_classification_class(case, tmp_path):
    tuned = tuned_by_lora(case)
    export_peft(tuned, tmp_path / "adapter")
    loaded = with_peft(case, tmp_path / "adapter")
    images = case.images()
    torch.testing.assert_close(loaded(images).logits, tuned(images).logits, atol=1e-6, rtol=1e-6)
    back = import_peft(tmp_path / "adapter", case.build())
    assert torch.equal(back(images).logits, tuned(images).logits)


@each([BY_NAME[name] for name in ("clip-head", "clip-two-towers", "dinov3", "vit_mae")])
def test_without_a_fitting_class_the_updates_alone_are_exported(case, tmp_path):
    tuned = tuned_by_lora(case)
    with pytest.warns(UserWarning, match="head is left out"):
        export_peft(tuned, tmp_path)
    loaded = peft.PeftModel.from_pretrained(case.build(), tmp_path).eval().base_model.model
    feature = case.facts.feature(case.tower(loaded), case.run_tower(loaded, case.images()))
    torch.testing.assert_close(feature, tuned.features(case.images()), atol=1e-6, rtol=1e-6)


def test_an_export_has_the_same_bytes_every_time(tmp_path):
    tuned = tuned_by_lora(VIT)
    for name in ("first", "second"):
        export_peft(tuned, tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_export_refuses_what_the_format_has_no_place_for(tmp_path):
    for configs, masked in [
        ([MemoryConfig(2)], False),
        ([LoraConfig(), MemoryConfig(2)], False),
        ([LoraConfig()], True),
    ]:
        with pytest.raises(ConfigError, match="LoRA alone, unmasked"):
            export_peft(wrap(VIT.build(), configs, num_labels=2, masked=masked), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        export_peft(tuned_by_lora(VIT), tmp_path / "file")


@each(WITH_HEAD)
@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True, "lora_alpha": 3}, {"use_dora": True}, {"layers_to_transform": [0]}],
    ids=str,
)
@pytest.mark.slow
def test_what_peft_wrote_is_imported(case, settings, tmp_path):
    if case.facts.windowed and "layers_to_transform" in settings:
        pytest.skip("PEFT's layers are Swin's stages")
    if "siglip" in case.name and "layers_to_transform" not in settings:  # its pooling head has layers of these names
        settings = settings | {"target_modules": rf".*layers\.\d+\..*({'|'.join(TARGETS)})"}
    expected = written_by_peft(case, tmp_path, **settings)
    tuned = import_peft(tmp_path, case.build())
    assert not tuned.training
    assert len(tuned.task.labels) == expected.shape[1]
    torch.testing.assert_close(tuned(case.images()).logits, expected, atol=1e-6, rtol=1e-6)


OLD_NAMES = {
    "vit": {"layers.": "encoder.layer.", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"},
    "dinov2": {},
    "swin": {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"},
}
OLD_NAMES["vit"] |= {f"attention.{new}_proj": f"attention.attention.{old}" for new, old in
                     [("q", "query"), ("k", "key"), ("v", "value")]}  # fmt: skip
OLD_NAMES["dinov2"] |= {key: value for key, value in OLD_NAMES["vit"].items() if key.startswith("attention")}
OLD_NAMES["swin"] |= {key: value.replace("attention.attention", "attention.self")
                      for key, value in OLD_NAMES["dinov2"].items()}  # fmt: skip
for names in OLD_NAMES.values():
    names["attention.o_proj"] = "attention.output.dense"
OLD_FAMILIES = dict.fromkeys(["vit-head", "deit-head", "vit_msn-head", "ijepa-head", "beit-head"], "vit")
OLD_FAMILIES |= {"dinov2-head": "dinov2", "dinov2_with_registers-head": "dinov2", "swin-head": "swin"}


def rename(folder, change):
    """Rewrite a folder's keys."""
    file = folder / "adapter_model.safetensors"
    save_file({change(key): tensor for key, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(("name", "old"), OLD_FAMILIES.items())
@pytest.mark.parametrize("dora", [False, True])
def test_folders_with_the_names_of_transformers_4_are_imported(name, old, dora, tmp_path):
    case = BY_NAME[name]
    expected = written_by_peft(case, tmp_path, use_dora=dora)

    def change(key):
        for new, before in OLD_NAMES[old].items():
            key = key.replace(new, before)
        return key

    rename(tmp_path, change)
    assert not any("q_proj" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["target_modules"] = ["query", "key", "value", "dense"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    torch.testing.assert_close(
        import_peft(tmp_path, case.build())(case.images()).logits, expected, atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("vit.encoder.layer.11.attention.attention.query", ((11,), "query")),
        ("vit.layers.11.attention.q_proj", ((11,), "query")),
        ("deit.encoder.layer.0.attention.output.dense", ((0,), "out")),
        ("beit.encoder.layer.2.intermediate.dense", ((2,), "fc1")),
        ("beit.encoder.layer.2.output.dense", ((2,), "fc2")),
        ("dinov2.encoder.layer.3.mlp.fc2", ((3,), "fc2")),
        ("swin.encoder.layers.1.blocks.0.attention.self.value", ((1, 0), "value")),
        ("vision_model.encoder.layers.4.self_attn.out_proj", ((4,), "out")),
        ("clip.vision_model.encoder.layers.4.mlp.fc1", ((4,), "fc1")),
        ("layer.4.attention.k_proj", ((4,), "key")),
        ("model.layer.4.mlp.down_proj", ((4,), "fc2")),
        ("text_model.encoder.layers.4.self_attn.q_proj", None),
        ("decoder.decoder_layers.0.attention.q_proj", None),
        ("vit.embeddings.patch_embeddings.projection", None),
        ("vit.layers.0.attention", None),
        ("classifier", None),
    ],
)
def test_module_paths_of_every_family(path, place):
    assert locate(path) == place


def test_older_spellings_of_keys_are_read(tmp_path):
    expected = written_by_peft(VIT, tmp_path, use_dora=True)
    older = {"lora_A.weight": "lora_A.default.weight", "magnitude_vector": "magnitude_vector.weight"}
    older["classifier."] = "classifier.modules_to_save."

    def change(key):
        for new, before in older.items():
            key = key.replace(new, before)
        return key

    rename(tmp_path, change)
    torch.testing.assert_close(import_peft(tmp_path, VIT.build())(VIT.images()).logits, expected, atol=1e-6, rtol=1e-6)


def test_labels_and_head_of_the_backbone(tmp_path):
    written_by_peft(VIT, tmp_path)
    assert import_peft(tmp_path, VIT.build(id2label={0: "x", 1: "y", 2: "z"})).task.labels == ["x", "y", "z"]
    assert import_peft(tmp_path, VIT.build(), labels=["p", "q", "r"]).task.labels == ["p", "q", "r"]
    assert import_peft(tmp_path, VIT.build(num_labels=7)).task.labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
    with pytest.raises(ConfigError, match="2 names, but the head has 3"):
        import_peft(tmp_path, VIT.build(), labels=["p", "q"])
    without = tmp_path / "without"
    expected = written_by_peft(VIT, without, modules_to_save=None)
    torch.testing.assert_close(import_peft(without, VIT.build())(VIT.images()).logits, expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(CheckpointError, match="no head"):
        import_peft(without, BY_NAME["vit"].build())


def test_unknown_missing_and_misshapen_keys_are_named(tmp_path):
    written_by_peft(VIT, tmp_path)
    good = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.vit.layers.1.attention."

    def with_tensors(changes):
        tensors = {key: tensor for key, tensor in (good | changes).items() if tensor is not None}
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        backbone = VIT.build()
        before = snapshot(backbone)
        with pytest.raises(CheckpointError) as caught:
            import_peft(tmp_path, backbone)
        assert_same(backbone, before)
        return str(caught.value)

    unknown = {f"{prefix}nothing.lora_A.weight": torch.ones(3, 16), "base_model.model.pooler.weight": torch.ones(1)}
    message = with_tensors(unknown)
    assert all(key in message for key in unknown)
    assert "layers.7" in with_tensors(
        {"base_model.model.vit.layers.7.attention.q_proj.lora_A.weight": torch.ones(3, 16)}
    )
    assert "missing: blocks.1.query.lora_A" in with_tensors({f"{prefix}q_proj.lora_A.weight": None})
    assert "blocks.1.query.lora_A: got the shape (2, 16)" in with_tensors(
        {f"{prefix}q_proj.lora_A.weight": torch.ones(2, 16)}
    )
    assert "not finite" in with_tensors({f"{prefix}q_proj.lora_A.weight": torch.full((3, 16), torch.nan)})
    assert "head.bias" in with_tensors({"base_model.model.classifier.bias": None})
    assert "no update" in with_tensors({key: None for key in good if "lora" in key})


def test_heads_that_read_something_else_are_refused(tmp_path):
    case = BY_NAME["dinov2-head"]
    export_peft(tuned_by_lora(case), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.classifier.weight"] += 1
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="the head reads 32 values"):
        import_peft(tmp_path, case.build())
    clip = BY_NAME["clip-head"]
    trained = peft.get_peft_model(
        clip.build(), peft.LoraConfig(target_modules=r"vision_model.*q_proj", modules_to_save=["classifier"])
    )
    trained.save_pretrained(tmp_path / "clip")
    with pytest.raises(CheckpointError, match="no image classification class"):
        import_peft(tmp_path / "clip", clip.build())


def test_updates_of_another_tower_are_refused(tmp_path):
    case = BY_NAME["siglip-two-towers"]
    model = peft.get_peft_model(case.build(), peft.LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="text_model"):
        import_peft(tmp_path, case.build())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "expected 'LORA'"),
        ({"peft_type": None}, "expected 'LORA'"),
        ({"a_new_setting": 3}, "a_new_setting"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"init_lora_weights": "olora"}, "frozen weight"),
        ({"bias": "all"}, "bias"),
        ({"r": "x"}, "r"),
    ],
    ids=str,
)
def test_unknown_settings_of_a_folder_are_named(changes, message, tmp_path):
    export_peft(tuned_by_lora(VIT), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ConfigError, match=message):
        import_peft(tmp_path, VIT.build())


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"adapter_config\.json and adapter_model\.safetensors not found"):
        import_peft(tmp_path, VIT.build())
    export_peft(tuned_by_lora(VIT), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="damaged"):
        import_peft(tmp_path, VIT.build())
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        import_peft(tmp_path, VIT.build())
    (tmp_path / "adapter_config.json").write_text("[]")
    export_peft(tuned_by_lora(VIT), tmp_path / "other")
    weights.write_bytes((tmp_path / "other" / weights.name).read_bytes())
    with pytest.raises(ConfigError, match="LORA"):
        import_peft(tmp_path, VIT.build())


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ("vit-head", "dinov2-head")])
def test_there_and_back_again(case, tmp_path):
    tuned = tuned_by_lora(case, blocks=[1], roles=["value", "fc1"], use_rslora=True, lora_alpha=3)
    export_peft(tuned, tmp_path)
    back = import_peft(tmp_path, case.build())
    assert {key: tensor.tolist() for key, tensor in back.task.tensors().items()} == {
        key: tensor.tolist() for key, tensor in tuned.task.tensors().items()
    }
    assert torch.equal(back(case.images()).logits, tuned(case.images()).logits)


WRITE = """
import sys
import peft, torch, transformers

assert transformers.__version__ == "4.57.6", transformers.__file__
torch.manual_seed(0)
shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
config = transformers.ViTConfig(**shape, image_size=32, patch_size=8, num_labels=3)
model = transformers.ViTForImageClassification(config).eval()
model.save_pretrained("backbone")
settings = peft.LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"])
model = peft.get_peft_model(model, settings).eval()
for parameter in model.parameters():
    if parameter.requires_grad:
        torch.nn.init.normal_(parameter, std=0.2)
model.save_pretrained("adapter")
images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
with torch.no_grad():
    torch.save({"images": images, "logits": model(images).logits}, "answers.pt")
"""


@pytest.mark.slow
def test_an_adapter_that_peft_wrote_under_transformers_4_gives_the_same_logits(tmp_path):
    """Written by the real releases: since transformers 5 renamed the modules, PEFT itself no longer finds them."""
    others = ["transformers==4.57.6", "huggingface_hub==0.36.2", "tokenizers==0.22.2", "peft==0.18.0"]
    site = install(tmp_path / "site", *others)
    environment = os.environ | {"PYTHONPATH": str(site)}
    subprocess.run([sys.executable, "-c", WRITE], cwd=tmp_path, env=environment, check=True, timeout=600)
    backbone = AutoModelForImageClassification.from_pretrained(tmp_path / "backbone")
    tuned = import_peft(tmp_path / "adapter", backbone, labels=["a", "b", "c"])
    answers = torch.load(tmp_path / "answers.pt", weights_only=True)
    with torch.no_grad():
        torch.testing.assert_close(tuned(answers["images"]).logits, answers["logits"], atol=1e-5, rtol=1e-5)
