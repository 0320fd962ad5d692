"""`wrap` and `TunedModel`: the backbone is never changed, and what Hugging Face users expect holds."""

from __future__ import annotations

import gc
import pickle
from typing import Any

import pytest
import torch
import transformers
from backbone_zoo import (
    BY_NAME,
    CASES,
    FAMILIES,
    GLOBAL,
    PLAIN,
    Case,
    assert_same,
    each,
    each_mode,
    frozen,
    outputs_equal,
    snapshot,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_outputs import ImageClassifierOutput

import memtune
from memtune import MemoryConfig, MemtuneError
from memtune.errors import ConfigError, InputError, UnsupportedBackboneError
from memtune.storage import STATE_KEY

PVT = PLAIN[-1]
"""A backbone without activation checkpointing."""

both_modes = pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])


def wrapped(case: str | Case = "vit", *, masked: bool = False, backbone: Any = None, **options: Any) -> Any:
    """A wrapped tiny model whose head and memory are far from their start."""
    case = BY_NAME[case] if isinstance(case, str) else case
    options = options or {"num_labels": 3}
    backbone = backbone if backbone is not None else case.build()
    model = memtune.wrap(backbone, MemoryConfig(tokens=2, init_std=0.5), masked=masked, **options)
    nn.init.normal_(model.task.head.weight)
    return model


def step(model: memtune.TunedModel, images: Tensor) -> None:
    """One training step in the model's training mode."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    model(images, labels=torch.arange(len(images)) % 2).loss.backward()
    optimizer.step()
    model.eval()


def own_output(case: Case, model: nn.Module, images: Tensor) -> Any:
    """The whole model's own answer: that of its head, or of both its towers."""
    if case.name.startswith("vit_mae"):
        torch.manual_seed(0)
    if "two-towers" not in case.name:
        return model(images)
    text = torch.tensor([[0, 5, 6, 7, 2, 1, 1], [0, 8, 9, 2, 1, 1, 1]])
    return model(input_ids=text, pixel_values=images, attention_mask=(text != 1).long())


# the backbone


@each_mode
def test_wrapping_and_training_leave_the_backbone_bit_for_bit(case: Case, masked: bool) -> None:
    backbone, images = case.build(), case.images()
    before = snapshot(backbone)
    with frozen(backbone):
        expected = own_output(case, backbone, images)
    model = wrapped(case, masked=masked, backbone=backbone)
    with torch.no_grad():
        assert outputs_equal(own_output(case, backbone, images), expected)
    step(model, images)
    assert_same(backbone, before, ignore=("requires_grad",))
    with torch.no_grad():
        assert outputs_equal(own_output(case, backbone, images), expected)
    assert model.detach() is backbone
    assert_same(backbone, before)
    assert all(parameter.grad is None for parameter in backbone.parameters())
    with frozen(backbone):
        assert outputs_equal(own_output(case, backbone, images), expected)


@each_mode
def test_detach_after_an_exception_inside_forward(case: Case, masked: bool) -> None:
    backbone, images = case.build().train(), case.images()
    list(backbone.parameters())[1].requires_grad_(False)
    before = snapshot(backbone)
    model = wrapped(case, masked=masked, backbone=backbone)
    model.stream.view.blocks[-1]["fc2"].register_forward_hook(_fail)
    with pytest.raises(ZeroDivisionError):
        model(images)
    model.detach()
    assert_same(backbone, before)
    with torch.no_grad():
        own_output(case, backbone, images)


def _fail(*arguments: Any) -> None:
    raise ZeroDivisionError


@both_modes
def test_detach_gives_back_flags_and_modes(masked: bool) -> None:
    backbone = BY_NAME["dinov2-head"].build().train()
    backbone.dinov2.embeddings.requires_grad_(False)
    before = snapshot(backbone)
    model = wrapped("dinov2-head", masked=masked, backbone=backbone)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    model.activation_checkpointing_enable()
    model.eval().train()
    model.detach()
    assert_same(backbone, before)


def test_checkpointing_is_refused_before_anything_changes_where_the_backbone_has_none() -> None:
    model = memtune.wrap(PVT.build(), memtune.LoraConfig(r=2), num_labels=3)
    for enable in (model.activation_checkpointing_enable, model.gradient_checkpointing_enable):
        with pytest.raises(UnsupportedBackboneError, match="does not support activation checkpointing"):
            enable()
    step(model, PVT.images())


@each([case for case in FAMILIES if case in GLOBAL])
def test_a_pass_can_be_counted(case: Case) -> None:
    """torch's counter places hooks on what requires a gradient, so without gradients nothing may say that it does."""
    model = memtune.wrap(case.build(), [MemoryConfig(2), memtune.LoraConfig(r=2)], num_labels=3, masked=True).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(case.images())
    assert counter.get_total_flops() > 0


@both_modes
def test_a_detached_model_says_so(masked: bool) -> None:
    model = wrapped(masked=masked)
    model.detach()
    for use in (
        lambda: model.backbone,
        lambda: model.task,
        lambda: model(BY_NAME["vit"].images()),
        lambda: model.features(BY_NAME["vit"].images()),
        lambda: model.detach(),
        lambda: model.train(),
        lambda: model.trainable_parameters(),
    ):
        with pytest.raises(MemtuneError, match="detached"):
            use()
    with pytest.raises(AttributeError, match="no_such"):
        _ = model.no_such


@both_modes
def test_the_kernel_is_the_backbones_at_that_moment(masked: bool) -> None:
    model = wrapped(masked=masked).eval()
    images = BY_NAME["vit"].images()
    with torch.no_grad():
        sdpa = model(images).logits
        model.backbone.set_attn_implementation("eager")
        eager = model(images).logits
    assert model.backbone.config._attn_implementation == "eager"
    torch.testing.assert_close(sdpa, eager, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@each([BY_NAME["clip-two-towers"], BY_NAME["siglip-two-towers"]])
def test_the_text_tower_and_its_mask_stay(case: Case, attention: str) -> None:
    backbone = case.build()
    backbone.set_attn_implementation(attention)
    text = {"input_ids": torch.tensor([[0, 5, 6, 2, 1, 1]]), "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])}
    other = {"input_ids": torch.tensor([[0, 5, 6, 2, 9, 9]]), "attention_mask": text["attention_mask"]}

    def states(inputs: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return backbone.text_model(**inputs).last_hidden_state[:, :4]

    expected = states(text)
    model = wrapped(case, backbone=backbone)
    step(model, case.images())
    assert torch.equal(states(text), expected)
    torch.testing.assert_close(states(other), expected)  # what is masked out is not seen


@both_modes
def test_two_wraps_of_one_backbone_do_not_disturb_each_other(masked: bool) -> None:
    case = BY_NAME["clip"]
    images = case.images()
    alone = [wrapped(case, masked=mode, backbone=case.build(), num_labels=4) for mode in (masked, False)]
    backbone = case.build()
    together = [wrapped(case, masked=mode, backbone=backbone, num_labels=4) for mode in (masked, False)]
    for one, other in zip(together, alone, strict=True):
        one.task.load_state_dict(other.task.state_dict())
    for model in (*alone, *together):
        step(model, images)
    with torch.no_grad():
        for one, other in zip(together, alone, strict=True):
            assert torch.equal(one(images).logits, other(images).logits)
    together[0].detach()
    step(together[1], images)
    step(alone[1], images)
    with torch.no_grad():
        assert torch.equal(together[1](images).logits, alone[1](images).logits)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first-first", "last-first"])
def test_the_last_detach_gives_the_backbone_back(order: tuple[int, int]) -> None:
    backbone = BY_NAME["vit"].build().train()
    before = snapshot(backbone)
    models = [wrapped(backbone=backbone), wrapped(backbone=backbone, masked=True)]
    assert models[1].training
    models[order[0]].detach()
    assert not any(parameter.requires_grad for parameter in backbone.parameters())  # the other still needs it frozen
    models[order[1]].detach()
    assert_same(backbone, before)


def test_a_tuned_model_that_is_gone_holds_no_backbone() -> None:
    backbone = BY_NAME["vit"].build()
    before = snapshot(backbone)
    first, second = wrapped(backbone=backbone), wrapped(backbone=backbone)
    del first
    gc.collect()
    second.detach()
    assert_same(backbone, before)


def test_a_configuration_shared_by_two_models_is_untouched() -> None:
    config = BY_NAME["vit"].config()
    config._attn_implementation = "eager"
    first, second = transformers.ViTModel(config), transformers.ViTModel(config)
    written = config.to_dict()
    model = memtune.wrap(first, MemoryConfig(), labels=["a", "b"])
    model(BY_NAME["vit"].images())
    assert first.config is config
    assert second.config is config
    assert config.to_dict() == written
    assert config._attn_implementation == "eager"
    assert model.config.id2label == {0: "a", 1: "b"}
    assert model.config.label2id == {"a": 0, "b": 1}


@each(FAMILIES)
def test_train_keeps_the_backbone_in_evaluation_mode(case: Case) -> None:
    """Dropout of a half everywhere has no effect."""
    names = ["hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "drop_path_rate"]
    has = case.config().to_dict()
    backbone = case.build(**{name: 0.5 for name in names if name in has}).train()
    for masked in (False, True)[: 1 if case.facts.staged else 2]:
        model = wrapped(case, masked=masked, backbone=backbone).train()
        assert model.training
        assert model.task.training
        assert not any(module.training for module in backbone.modules())
        first, second = (model(case.images()).logits for _ in range(2))
        assert torch.equal(first, second)
        model.detach()
        assert all(module.training for module in backbone.modules())


# the outputs


@both_modes
def test_output(masked: bool) -> None:
    model = wrapped(masked=masked, labels=["a", "b", "c"])
    images, labels = BY_NAME["vit"].images(), torch.tensor([2, 0])
    output = model(pixel_values=images, labels=labels)
    assert isinstance(output, ImageClassifierOutput)
    assert output.logits.shape == (2, 3)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, labels))
    assert model(images).loss is None
    loss, logits = model(images, labels, return_dict=False)
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)
    assert len(model(images, return_dict=False)) == 1


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_labels_of_any_whole_type(dtype: torch.dtype) -> None:
    images = BY_NAME["vit"].images()
    model = wrapped()
    expected = model(images, labels=torch.tensor([2, 0])).loss
    assert torch.equal(model(images, labels=torch.tensor([2, 0], dtype=dtype)).loss, expected)


def test_ignored_labels() -> None:
    images = BY_NAME["vit"].images()
    model = wrapped()
    expected = model(images[:1], labels=torch.tensor([2])).loss
    torch.testing.assert_close(model(images, labels=torch.tensor([2, -100])).loss, expected)


def test_numbers_of_labels_get_names() -> None:
    assert wrapped(num_labels=2).task.labels == ["LABEL_0", "LABEL_1"]
    assert wrapped(labels=("x", "y"), num_labels=2).task.labels == ["x", "y"]


@each(CASES)
def test_a_disabled_adapter_answers_as_the_backbone(case: Case) -> None:
    backbone, images = case.build(), case.images()
    model = wrapped(case, backbone=backbone).eval()
    target = case.tower(backbone) if "two-towers" in case.name else backbone
    with torch.no_grad():
        torch.manual_seed(0)
        expected = target(pixel_values=images)
        with model.disable_adapter():
            with model.disable_adapter():
                pass
            torch.manual_seed(0)
            assert outputs_equal(model(images), expected)
        assert model(images).logits.shape == (2, 3)


def test_the_adapter_is_enabled_again_after_an_exception() -> None:
    model = wrapped()
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        _fail()
    assert isinstance(model(BY_NAME["vit"].images()), ImageClassifierOutput)


# copies, types, kernels


@both_modes
def test_a_model_can_be_pickled(masked: bool) -> None:
    images = BY_NAME["vit"].images()
    model = wrapped(masked=masked).eval()
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(copied(images).logits, model(images).logits)


@both_modes
def test_casting_the_whole_model(masked: bool) -> None:
    images = BY_NAME["beit"].images()
    model = wrapped("beit", masked=masked).eval()
    with torch.no_grad():
        expected = model(images).logits
        torch.testing.assert_close(model.double()(images.double()).logits.float(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "beit-head"])
@both_modes
def test_compiled_without_a_break_in_the_graph(name: str, masked: bool) -> None:
    case = BY_NAME[name]
    images, labels = case.images(), torch.tensor([0, 1])
    model = wrapped(case, masked=masked).train()
    expected = model(images, labels=labels)
    expected.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.task.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        model.zero_grad()
        output = compiled(images, labels=labels)
        output.loss.backward()
        torch.testing.assert_close(output.logits, expected.logits, atol=1e-5, rtol=1e-5)
    for key, parameter in model.task.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key], atol=1e-5, rtol=1e-4)


# the state


@each_mode
def test_the_state_is_the_tasks(case: Case, masked: bool) -> None:
    model = wrapped(case, masked=masked)
    assert model.state_dict().keys() == {STATE_KEY, *(f"task.{key}" for key in model.task.state_dict())}


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@both_modes
def test_a_state_is_loaded_strictly(masked: bool, assign: bool) -> None:
    images = BY_NAME["vit"].images()
    first, second = wrapped(masked=masked), wrapped(masked=masked).eval()
    step(first, images)
    before = snapshot(second.backbone)
    with torch.no_grad():
        second(images)  # what it keeps of the old state must not be used
    result = second.load_state_dict(first.state_dict(), strict=True, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_same(second.backbone, before)
    with torch.no_grad():
        assert torch.equal(first(images).logits, second(images).logits)
    state = first.state_dict()
    missing = next(key for key in state if key != STATE_KEY)
    del state[missing]
    with pytest.raises(RuntimeError, match=missing):
        second.load_state_dict(state)


@both_modes
def test_a_state_within_another_module(masked: bool) -> None:
    images = BY_NAME["vit"].images()

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = wrapped(masked=masked)
            self.scale = nn.Linear(3, 1)

        def forward(self, images: Tensor) -> Tensor:
            return self.scale(self.model(images).logits)

    first, second = Own(), Own()
    step(first.model, images)
    state = first.state_dict()
    assert {key.split(".")[0] for key in state} == {"model", "scale"}
    assert not any("backbone" in key for key in state)
    second.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(first.eval()(images), second.eval()(images))
    del state["scale.bias"]
    with pytest.raises(RuntimeError, match=r"scale\.bias"):
        second.load_state_dict(state)


def test_summary_of_trainable_parameters(capsys: pytest.CaptureFixture) -> None:
    model = wrapped(num_labels=3)
    backbone = sum(parameter.numel() for parameter in model.backbone.parameters())
    assert model.trainable_parameters() == {
        "memory": 2 * 2 * 16,
        "class_token": 16,
        "head": 3 * 17,
        "total": 64 + 16 + 51,
        "backbone": backbone,
    }
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: 131 || all params: {131 + backbone:,} || trainable%")


# bad input

BAD_LABELS = [
    {},
    {"labels": []},
    {"labels": "ab"},
    {"labels": 3},
    {"labels": ["a", "a"]},
    {"labels": ["a", 1]},
    {"labels": ["a", ""]},
    {"labels": {"a", "b"}},
    {"labels": ["a", "b"], "num_labels": 3},
    {"num_labels": 0},
    {"num_labels": -1},
    {"num_labels": 2.0},
    {"num_labels": True},
    {"num_labels": "2"},
]


@pytest.mark.parametrize("options", BAD_LABELS)
def test_wrong_labels_are_refused(options: dict[str, Any]) -> None:
    backbone = BY_NAME["vit"].build().train()
    before = snapshot(backbone)
    with pytest.raises(ConfigError, match="labels"):
        memtune.wrap(backbone, MemoryConfig(), **options)
    assert_same(backbone, before)


@pytest.mark.parametrize("config", [None, "memory", {"tokens": 4}, 4, [None], MemoryConfig], ids=str)
def test_wrong_configurations_are_refused(config: Any) -> None:
    backbone = BY_NAME["vit"].build().train()
    before = snapshot(backbone)
    with pytest.raises(ConfigError, match="expected a configuration"):
        memtune.wrap(backbone, config, num_labels=2)
    assert_same(backbone, before)


@both_modes
def test_the_same_method_twice_is_refused(masked: bool) -> None:
    backbone = BY_NAME["vit"].build().train()
    before = snapshot(backbone)
    with pytest.raises(ConfigError, match=r"own the same parameters, such as blocks\.0\.memory"):
        memtune.wrap(backbone, [MemoryConfig(), MemoryConfig()], num_labels=2, masked=masked)
    assert_same(backbone, before)


def test_nothing_changes_when_a_wrap_is_refused() -> None:
    for name, config, masked in [
        ("vit", MemoryConfig(blocks=[7]), False),
        ("swin", MemoryConfig(), True),
        ("swin", MemoryConfig(blocks=[3]), False),
    ]:
        backbone = BY_NAME[name].build().train()
        before = snapshot(backbone)
        with pytest.raises((ConfigError, UnsupportedBackboneError)):
            memtune.wrap(backbone, config, num_labels=2, masked=masked)
        assert_same(backbone, before)


BAD_IMAGES = [
    (None, "got NoneType"),
    ([1.0], "got list"),
    (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "got torch.uint8"),
    (torch.zeros(3, 32, 32), r"shape \(3, 32, 32\)"),
    (torch.zeros(2, 1, 32, 32), "got 1 channels, expected 3"),
    (torch.zeros(2, 3, 48, 48), "got 48 x 48 pixels, expected 32 x 32.*interpolate_pos_encoding"),
    (torch.zeros(2, 3, 32, 40), "got 32 x 40 pixels"),
]


@pytest.mark.parametrize(("images", "message"), BAD_IMAGES, ids=[message for _, message in BAD_IMAGES])
@both_modes
def test_wrong_images_are_refused(images: Any, message: str, masked: bool) -> None:
    model = wrapped(masked=masked)
    with pytest.raises(InputError, match=message):
        model(images)
    with model.disable_adapter(), pytest.raises(InputError, match=message):
        model(images)


@each_mode
def test_images_of_another_size(case: Case, masked: bool) -> None:
    model = wrapped(case, masked=masked)
    images = case.images(size=case.image_size + 16)
    if not case.facts.any_size and "dinov2" not in case.name:
        with pytest.raises(InputError, match="interpolate_pos_encoding=True"):
            model(images)
    model(images, interpolate_pos_encoding=True, labels=torch.tensor([0, 1])).loss.backward()


BAD_TARGETS = [
    (torch.tensor([0, 3]), r"got \[3\], expected class indices from 0 to 2"),
    (torch.tensor([-1, 0]), r"got \[-1\]"),
    (torch.tensor([0.0, 1.0]), "got torch.float32"),
    (torch.tensor([True, False]), "got torch.bool"),
    (torch.tensor([0]), r"shape \(1,\), expected a tensor of 2"),
    (torch.tensor([[0], [1]]), r"shape \(2, 1\)"),
    ([0, 1], "got list"),
    ("cat", "got str"),
]


@pytest.mark.parametrize(("labels", "message"), BAD_TARGETS, ids=[message for _, message in BAD_TARGETS])
@both_modes
def test_wrong_targets_are_refused(labels: Any, message: str, masked: bool) -> None:
    model = wrapped(masked=masked)
    with pytest.raises(InputError, match=message):
        model(BY_NAME["vit"].images(), labels=labels)
