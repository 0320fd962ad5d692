"""`wrap(..., head="backbone")`: the backbone's own head, such as a decoder of maps, reads the adapted tower."""

from __future__ import annotations

import copy
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from backbone_zoo import BY_NAME, FAMILIES, Case, assert_same, each, outputs_equal, snapshot
from multitask import tune
from segformer import SlowSegformer
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import ModelOutput

import memtune
from memtune import AdapterConfig, ApproximatedPromptConfig, CodaPromptConfig, LoraConfig, MemoryConfig
from memtune.backbones import Backbone
from memtune.cli.parser import main
from memtune.errors import BackboneMismatchError, CheckpointError, ConfigError, InputError, UnsupportedBackboneError
from memtune.models.arithmetic import merge_adapters
from memtune.models.export import export_program

SWIN: dict[str, Any] = {"model_type": "swin", "image_size": 48, "embed_dim": 8, "depths": [2, 1, 1, 1]}
SWIN |= {"num_heads": [1, 2, 2, 2], "window_size": 2, "mlp_ratio": 2.0, "drop_path_rate": 0.0}
SWIN |= {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
BEIT: dict[str, Any] = {"model_type": "beit", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BEIT |= {"intermediate_size": 24, "image_size": 32, "patch_size": 8, "use_relative_position_bias": True}
MASKS: dict[str, Any] = {"mask_feature_size": 32, "num_queries": 3, "num_labels": 3}
MASK2FORMER = MASKS | {"backbone_config": SWIN, "feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 12}
MASK2FORMER |= {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "dim_feedforward": 12}
MASK2FORMER |= {"train_num_points": 20}
DETR = transformers.DetrConfig(d_model=8, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=12)
MASKFORMER = {"fpn_feature_size": 32, "mask_feature_size": 8, "num_labels": 3, "backbone_config": SWIN}
MASKFORMER |= {"decoder_config": DETR.to_dict() | {"num_queries": 3}}
UPERNET: dict[str, Any] = {"hidden_size": 8, "pool_scales": [1, 2], "auxiliary_channels": 8, "num_labels": 3}
UPERNET_BEIT = BEIT | {"out_features": ["stage1", "stage2"], "reshape_hidden_states": True}
DINOV2 = BY_NAME["dinov2"].settings | {"model_type": "dinov2", "out_features": ["stage1", "stage2"]}
SEGFORMER = BY_NAME["segformer"]

SEGMENTERS = [
    Case("segformer", "SegformerForSemanticSegmentation", SEGFORMER.settings | {"num_labels": 3}),
    Case(
        "upernet-swin",
        "UperNetForSemanticSegmentation",
        UPERNET | {"backbone_config": SWIN, "auxiliary_in_channels": 32},
    ),
    Case(
        "upernet-beit",
        "UperNetForSemanticSegmentation",
        UPERNET | {"backbone_config": UPERNET_BEIT, "auxiliary_in_channels": 16, "use_auxiliary_head": False},
    ),
    Case(
        "upernet-dinov2",
        "UperNetForSemanticSegmentation",
        UPERNET | {"backbone_config": DINOV2, "auxiliary_in_channels": 16, "use_auxiliary_head": False},
    ),
    Case(
        "mask2former",
        "Mask2FormerForUniversalSegmentation",
        MASK2FORMER,
        config_class="Mask2FormerConfig",
        image_size=64,
    ),
    Case(
        "maskformer",
        "MaskFormerForInstanceSegmentation",
        MASKFORMER,
        config_class="MaskFormerConfig",
        image_size=64,
    ),
]
NAMED = {case.name: case for case in SEGMENTERS}
READ = [case for case in SEGMENTERS if case.name != "maskformer"]
"""Those whose attention modules call transformers' AttentionInterface."""

SETTINGS: list[AdapterConfig] = [MemoryConfig(2), CodaPromptConfig(6, 4, blocks=(0, 1), ortho_mu=0.1)]


def targets(case: Case) -> dict[str, Any]:
    """What the model takes as labels, for two images."""
    if "former" not in case.name or case.name == "segformer":
        return {"labels": torch.arange(2 * case.image_size**2).view(2, case.image_size, -1) % 3}
    halves = torch.zeros(2, case.image_size, case.image_size)
    halves[0, :20], halves[1, 20:] = 1, 1
    return {"mask_labels": [halves, halves], "class_labels": [torch.tensor([0, 2]), torch.tensor([1, 0])]}


def answer(output: Any) -> Tensor:
    return output.logits if "logits" in output else output.masks_queries_logits


def adapted(case: Case | str, config: AdapterConfig | None = None, *, backbone: Any = None) -> Any:
    """A wrapped model, its trained values random."""
    case = NAMED[case] if isinstance(case, str) else case
    backbone = case.build() if backbone is None else backbone
    model = memtune.wrap(backbone, config or LoraConfig(r=2), head="backbone").eval()
    with torch.no_grad():
        for parameter in model.task.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


@each(SEGMENTERS)
def test_a_new_adapter_changes_nothing_and_the_models_own_class_answers(case: Case) -> None:
    backbone, given = case.build(), targets(case)
    backbone(case.images())
    before = snapshot(backbone)
    model = memtune.wrap(backbone, LoraConfig(r=2), head="backbone").eval()
    torch.manual_seed(0)  # Mask2Former's loss is that of random points
    expected = backbone(case.images(), **given)
    torch.manual_seed(0)
    output: Any = model(case.images(), **given)
    assert type(output) is type(expected)
    assert list(output) == list(expected)
    torch.testing.assert_close(answer(output), answer(expected), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-4, rtol=1e-4)
    with torch.no_grad():  # else torch takes another kernel where a layer is trained
        assert outputs_equal(model(case.images()), backbone(case.images()))
    assert "loss" not in model(case.images())
    assert torch.equal(model(case.images(), return_dict=False)[-1], model(case.images()).to_tuple()[-1])
    assert model.config.id2label == backbone.config.id2label
    assert len(model.config.id2label) == 3
    model.detach()
    assert_same(backbone, before)


PAIRS = [(case, config) for case in SEGMENTERS for config in (LoraConfig(r=2), ApproximatedPromptConfig(n=30, r=2))]
PAIRS += [(case, config) for case in READ for config in SETTINGS]


@pytest.mark.parametrize(("case", "config"), PAIRS, ids=[f"{case.name}-{config.method}" for case, config in PAIRS])
@pytest.mark.slow
def test_it_trains_the_adapter_alone(case: Case, config: AdapterConfig) -> None:
    backbone, images, given = case.build(), case.images(), targets(case)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    model = adapted(case, config, backbone=backbone).train()
    with torch.no_grad():  # now that it is frozen, as torch's attention takes another kernel then
        own = backbone(images)
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=5e-4)
    losses = []
    for _ in range(6):
        torch.manual_seed(0)
        loss = model(images, **given).loss
        loss.backward()
        if not losses:
            gradients = {
                name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad
            }
            assert gradients.keys() == {f"task.{name}" for name, _ in model.task.named_parameters()}
            assert all(gradient is not None and gradient.any() for gradient in gradients.values())
        assert all(parameter.grad is None for parameter in backbone.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert min(losses[1:]) < losses[0] - 1e-3
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    with torch.no_grad():
        assert outputs_equal(backbone(images), own)
        assert (answer(model.eval()(images)) - answer(own)).abs().max() > 1e-3
        with model.disable_adapter():
            assert outputs_equal(model(images), own)
            assert model(images, **given).loss is not None


@pytest.mark.parametrize("config", SETTINGS, ids=lambda config: config.method)
@each(READ)
def test_the_head_reads_what_the_features_are_made_of(case: Case, config: AdapterConfig) -> None:
    """One way of running an adapted tower is tried against the other, which has tests of its own (test_contract)."""
    model = adapted(case, config)
    expected = memtune.wrap(model.backbone, config, head=None).eval()
    expected.task.load_tensors(model.task.tensors())
    seen: list[Any] = []
    model.stream.view.tower.register_forward_hook(lambda tower, args, output: seen.append(output))
    with torch.no_grad():
        for size in (case.image_size, 32):
            model(case.images(size=size))
            found = Backbone(model.backbone).family.feature(model.stream.view.tower, seen[-1])
            torch.testing.assert_close(found, expected(case.images(size=size)).pooler_output, atol=1e-5, rtol=1e-5)


def test_a_segformers_decoder_reads_maps_made_with_memory() -> None:
    case = NAMED["segformer"]
    model, given = adapted(case, MemoryConfig(3)), targets(case)
    output = model(case.images(), **given)
    output.loss.backward()
    memory = {int(name.split(".")[1]): tensor for name, tensor in model.task.tensors().items()}
    for tensor in memory.values():
        tensor.requires_grad_()
    maps = SlowSegformer(model.backbone.segformer, memory).maps(case.images())
    expected = model.backbone.decode_head(maps)
    torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=1e-5)
    resized = nn.functional.interpolate(expected, size=given["labels"].shape[1:], mode="bilinear")
    nn.functional.cross_entropy(resized, given["labels"]).backward()
    for index, tensor in memory.items():
        own = model.task.adapters[0].get_parameter(f"blocks.{index}.memory").grad
        torch.testing.assert_close(own, tensor.grad, atol=1e-6, rtol=1e-4)


def test_what_a_method_adds_to_the_loss() -> None:
    model = adapted("upernet-swin", SETTINGS[1]).train()
    given = targets(NAMED["upernet-swin"])
    images = NAMED["upernet-swin"].images()
    penalty = model.task.penalty()
    assert penalty > 0
    torch.testing.assert_close(model(images, **given).loss, model.eval()(images, **given).loss + penalty)
    assert "loss" not in model.train()(images)


@each([case for case in FAMILIES if "mae" not in case.name])
def test_all_tokens_of_a_model_without_a_head(case: Case) -> None:
    backbone = case.build()
    model = adapted(case, LoraConfig(r=2), backbone=backbone)
    with torch.no_grad():
        output = model(case.images(), output_hidden_states=True)
        own = backbone(case.images(), output_hidden_states=True)
    assert list(output) == list(own)
    assert output.last_hidden_state.shape == own.last_hidden_state.shape
    assert (output.last_hidden_state - own.last_hidden_state).abs().max() > 0.01
    assert len(output.hidden_states) == len(own.hidden_states)
    torch.testing.assert_close(model.features(case.images()), case.facts.feature(case.tower(backbone), output))


def test_a_classifiers_own_classes() -> None:
    case = BY_NAME["vit-head"]
    model = adapted(case, MemoryConfig(2))
    output = model(case.images(), labels=torch.tensor([0, 2]))
    assert type(output) is ImageClassifierOutput
    assert output.logits is not None
    assert output.loss is not None
    assert output.logits.shape == (2, 3)
    assert torch.isfinite(output.loss)
    larger = model(case.images(size=48), interpolate_pos_encoding=True)
    assert larger.logits.shape == (2, 3)
    with pytest.raises(InputError, match="interpolate_pos_encoding=True"):
        model(case.images(size=48))


def test_text_beside_the_images() -> None:
    clip = BY_NAME["clip-two-towers"]
    model = adapted(clip, MemoryConfig(2)).train()
    text = torch.tensor([[0, 5, 6, 7, 2], [0, 8, 9, 4, 2]])
    output = model(clip.images(), input_ids=text, return_loss=True)
    output.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.task.parameters())
    own = model.backbone(input_ids=text, pixel_values=clip.images())
    assert torch.equal(output.text_embeds, own.text_embeds)
    assert (output.image_embeds - own.image_embeds).abs().max() > 1e-3


def test_vilt_takes_text_with_its_images() -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
    config = transformers.ViltConfig(
        **sizes, intermediate_size=24, vocab_size=30, image_size=32, patch_size=8, max_position_embeddings=12
    )
    vilt = transformers.ViltForQuestionAnswering(config).eval()
    model = memtune.wrap(vilt, LoraConfig(r=2), head="backbone").train()
    inputs: dict[str, Any] = {"input_ids": torch.tensor([[1, 7, 3], [1, 9, 2]]), "labels": torch.eye(3)[:2]}
    torch.manual_seed(0)  # ViLT puts the patches in a random order
    expected = vilt(pixel_values=SEGFORMER.images(), **inputs)
    torch.manual_seed(0)
    output: Any = model(SEGFORMER.images(), **inputs)
    torch.testing.assert_close(output.logits, expected.logits)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.task.parameters())


# folders


@pytest.mark.parametrize("name", ["segformer", "mask2former"])
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    case = NAMED[name]
    model = adapted(case)
    model.save_pretrained(tmp_path / "one")
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert (config["head"], config["labels"]) == ("backbone", [])
    assert config["backbone"]["model_class"] == case.model_class
    backbone = case.build()
    loaded = memtune.load(tmp_path / "one", backbone=backbone)
    assert outputs_equal(loaded(case.images()), model(case.images()))
    loaded.save_pretrained(tmp_path / "two")
    files = [{path.name: path.read_bytes() for path in (tmp_path / which).iterdir()} for which in ("one", "two")]
    assert files[0] == files[1]
    copies = [copy.deepcopy(loaded), memtune.load(tmp_path / "two", backbone)]
    if name == "segformer":  # transformers' AutoBackbones have hooks that cannot be pickled
        copies.append(pickle.loads(pickle.dumps(loaded)))
    for copied in copies:
        assert outputs_equal(copied(case.images()), model(case.images()))


def test_other_folders_do_not_say_what_their_head_is(tmp_path: Path) -> None:
    tune(BY_NAME["vit"].build(), MemoryConfig(2), masked=True).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "head" not in config
    assert "head_fingerprint" not in config["backbone"]


def test_another_head_is_refused(tmp_path: Path) -> None:
    case = NAMED["segformer"]
    adapted(case).save_pretrained(tmp_path)
    classifier = BY_NAME["segformer-head"].build()
    classifier.segformer.load_state_dict(case.build().segformer.state_dict())
    with pytest.raises(
        BackboneMismatchError, match=r"got a SegformerForImageClassification, expected a SegformerForSem"
    ):
        memtune.load(tmp_path, backbone=classifier)
    other = case.build()
    with torch.no_grad():
        other.decode_head.classifier.weight.add_(1)
    with pytest.raises(BackboneMismatchError, match="the same backbone, but another head or other weights"):
        memtune.load(tmp_path, backbone=other)
    loaded = memtune.load(tmp_path, backbone=other, any_weights=True)
    assert loaded(case.images()).logits.shape == (2, 3, 8, 8)
    halved = memtune.load(tmp_path, backbone=case.build().to(torch.bfloat16))
    assert halved(case.images().to(torch.bfloat16)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("change", [{"labels": ["cat"]}, {"head": "linear"}, {"head": None}])
def test_a_folder_that_contradicts_itself(change: dict[str, Any], tmp_path: Path) -> None:
    adapted("segformer").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=r"head is .* labels; expected 'backbone', with none"):
        memtune.load(tmp_path, backbone=NAMED["segformer"].build())


@pytest.mark.parametrize(("name", "task"), [("segformer", "image-segmentation"), ("mask2former", "image-segmentation")])
def test_the_folder_says_so(
    name: str, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = NAMED[name]
    case.build().save_pretrained(tmp_path / "segmenter")
    backbone = getattr(transformers, case.model_class).from_pretrained(tmp_path / "segmenter")
    model = adapted(case, backbone=backbone)
    model.save_pretrained(tmp_path / "adapter")
    assert outputs_equal(memtune.load(tmp_path / "adapter")(case.images()), model(case.images()))
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert f"pipeline_tag: {task}" in card
    assert f"the head of the backbone, a `{case.model_class}`, reads the adapted tower" in card
    assert "## Classes" not in card
    monkeypatch.chdir(tmp_path / "adapter")
    code = card.split("```python\n")[1].split("```")[0]
    exec(compile(code, "card", "exec"), {})
    assert "logits" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "adapter")]) == 0
    assert f"none: the head of {case.model_class} reads it" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "adapter"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["head"] == "backbone"


@pytest.mark.parametrize("name", ["vit-head", "deit-teacher"])
def test_the_card_of_a_classifier(name: str, tmp_path: Path) -> None:
    adapted(BY_NAME[name]).save_pretrained(tmp_path)
    assert "pipeline_tag: image-classification" in (tmp_path / "README.md").read_text()


def test_merged_it_is_the_whole_model() -> None:
    case = NAMED["segformer"]
    model = adapted(case)
    merged: Any = model.merge()
    assert type(merged) is type(model.backbone)
    torch.testing.assert_close(merged(case.images()).logits, model(case.images()).logits, atol=1e-5, rtol=1e-5)


def test_exported_for_peft(tmp_path: Path) -> None:
    import peft

    case = NAMED["segformer"]
    model = adapted(case)
    model.export_peft(tmp_path)
    loaded: Any = peft.PeftModel.from_pretrained(case.build(), str(tmp_path)).eval()
    torch.testing.assert_close(loaded(case.images()).logits, model(case.images()).logits, atol=1e-5, rtol=1e-5)


# training


class Maps(torch.utils.data.Dataset):
    """Images with a map of labels each."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": SEGFORMER.images(4)[index], "labels": torch.full((32, 32), index % 3)}


def test_transformers_trainer_trains_it(tmp_path: Path) -> None:
    model = adapted("segformer")
    before = {name: parameter.detach().clone() for name, parameter in model.task.named_parameters()}
    settings: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "max_steps": 3}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), **settings, dataloader_pin_memory=False, learning_rate=0.01
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Maps(), eval_dataset=Maps())
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    assert all((parameter - before[name]).any() for name, parameter in model.task.named_parameters())


@pytest.mark.parametrize("config", [LoraConfig(r=2), MemoryConfig(2)], ids=lambda config: config.method)
def test_activation_checkpointing_changes_nothing(config: AdapterConfig) -> None:
    case = NAMED["segformer"]
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = adapted(case, config).train()
        if recompute:
            model.gradient_checkpointing_enable()
        model(case.images(), **targets(case)).loss.backward()
        found.append([parameter.grad for parameter in model.task.parameters()])
    torch.testing.assert_close(found[0], found[1])


# beside other tasks


@each(READ)
def test_tasks_with_labels_beside_the_backbones_own_answer(case: Case) -> None:
    """Adapters for labels on the backbone within a segmenter, which answers from the same pass."""
    backbone, images = case.build().requires_grad_(False), case.images()
    with torch.no_grad():
        own = backbone(images)
    masked = case.name == "upernet-beit"
    tasks = {"a": tune(backbone, MemoryConfig(2), masked=masked), "b": tune(backbone, LoraConfig(r=2), masked=False)}
    model = memtune.combine(backbone, tasks)
    output = model(images)
    assert outputs_equal(output.base, own)
    for name, task in tasks.items():
        torch.testing.assert_close(output[name].logits, task(images).logits, atol=1e-5, rtol=1e-5)


def test_each_thread_has_its_own_pass() -> None:
    case = NAMED["upernet-swin"]
    backbone = case.build()
    model = memtune.combine(backbone, {"a": tune(backbone, CodaPromptConfig(6, 4, blocks=(0, 1)), masked=False)})
    batches = [case.images(number) for number in (1, 2, 3, 4)] * 3
    alone = [model(images) for images in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(model, batches))
    for one, other in zip(alone, together, strict=True):
        assert outputs_equal(one.base, other.base)
        assert torch.equal(one["a"].logits, other["a"].logits)


# what is refused


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"masked": True},
            UnsupportedBackboneError,
            r"masked=True: got head='backbone'.*SegformerForSem.*makes no map",
        ),
        (
            {"labels": ["cat"]},
            ConfigError,
            "head='backbone': the model gives the backbone's output; labels, num_labels",
        ),
        ({"num_labels": 2}, ConfigError, "head='backbone'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    backbone = NAMED["segformer"].build()
    with pytest.raises(error, match=message):
        memtune.wrap(backbone, LoraConfig(r=2), head="backbone", **options)
    assert all(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize("name", ["vit_mae", "vit_mae-pretraining"])
def test_vit_mae_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedBackboneError, match="fills in patches that were hidden at random"):
        memtune.wrap(BY_NAME[name].build(), LoraConfig(r=2), head="backbone")


DATA = [{"pixel_values": SEGFORMER.images(1)[0], "labels": 0}]


@pytest.mark.parametrize(
    "use",
    [
        lambda model: memtune.combine(model.backbone, {"a": model}),
        lambda model: memtune.fit(model, DATA),
        lambda model: memtune.evaluate(model, DATA),
        lambda model: memtune.pipeline(model, image_processor=print),
        lambda model: merge_adapters([model, model], head="mean"),
        export_program,
    ],
    ids=["combine", "fit", "evaluate", "pipeline", "arithmetic", "export"],
)
def test_what_needs_labels_says_so(use: Any) -> None:
    with pytest.raises(
        ConfigError, match="was wrapped with head='backbone': it gives the backbone's output, and has no"
    ):
        use(adapted("segformer"))


def test_other_inputs_are_refused_by_other_heads() -> None:
    model = tune(BY_NAME["vit"].build(), MemoryConfig(2), masked=False)
    with pytest.raises(
        InputError, match=r"got \['mask_labels'\]; a head that is not the backbone's takes pixel_values"
    ):
        model(BY_NAME["vit"].images(), mask_labels=[])
    with pytest.raises(ConfigError, match="trunk: got an unmasked model"):
        adapted("segformer")(trunk=object())
    with pytest.raises(InputError, match="pixel_values: got NoneType"):
        adapted("segformer")()


def test_its_output_is_a_model_output() -> None:
    assert isinstance(adapted("segformer")(SEGFORMER.images()), ModelOutput)
