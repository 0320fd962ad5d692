"""What a model looks at: the weights beside attention written out over dense keys, and beside transformers' own."""

import math
import sys

import numpy as np
import pytest
import torch
from backbone_zoo import BY_NAME, PLAIN, assert_same, each_mode, snapshot
from PIL import Image
from transformers import ViTImageProcessorPil

import memtune
from memtune import ApproximatedPromptConfig, CodaPromptConfig, LoraConfig, MemoryConfig, MemtuneError
from memtune.errors import ConfigError, InputError, UnsupportedBackboneError
from memtune.explaining.explanation import memory_usage
from memtune.explaining.pictures import mean_attention

HEADS, WIDTH, HEAD_WIDTH = 2, 16, 8
LABELS = ["cat", "dog", "bird"]
CODA = CodaPromptConfig(pool_size=4, prompt_length=4, blocks=None)
METHODS = {  # with the number of memory tokens and of further keys: half the rows of a prompt
    "memory": (MemoryConfig(3), 3, 0),
    "lora": (LoraConfig(r=2), 0, 0),
    "coda": (CODA, 0, 2),
    "approximated": (ApproximatedPromptConfig(n=3), 0, 0),
    "several": ([CODA, MemoryConfig(2), LoraConfig(r=2)], 2, 2),
}


def build(config=None, *, masked=False, backbone=None, processor=None, **options):
    """A tuned tiny model whose every trained parameter is random."""
    model = memtune.wrap(
        backbone or BY_NAME["vit"].build(),
        MemoryConfig(3) if config is None else config,
        labels=LABELS,
        masked=masked,
        processor=processor,
        **options,
    )
    with torch.no_grad():
        for parameter in model.task.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


def processor():
    return ViTImageProcessorPil(size={"height": 32, "width": 32})


def whole(block):
    """All weights of a block side by side, (..., keys)."""
    names = ["own", "class_token", "registers", "earlier", "memory", "further"]
    return torch.cat([block.patches.flatten(-2), *(getattr(block, name) for name in names)], dim=-1)


def by_heads(tokens):
    return tokens.unflatten(-1, (HEADS, HEAD_WIDTH)).movedim(-2, 0)  # (heads, tokens, head width)


def slow_block(layer, queries, keys):
    """A block of ViT written out: tokens (queries, width) see tokens (keys, width); gives their states and weights."""
    attention, normed = layer.attention, layer.layernorm_before
    query, key = by_heads(attention.q_proj(normed(queries))), by_heads(attention.k_proj(normed(keys)))
    value = by_heads(attention.v_proj(normed(keys)))
    scores = torch.einsum("hqd,hkd->hqk", query, key) / math.sqrt(HEAD_WIDTH)
    weights = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
    context = torch.einsum("hqk,hkd->qhd", weights, value).flatten(1)
    states = queries + attention.o_proj(context)
    return states + layer.mlp(layer.layernorm_after(states)), weights


@torch.no_grad()
def slow_weights(model, images):
    """Weights (heads, keys) of the class token or the task token on keys side by side: tokens, itself, memory."""
    vit, task = model.backbone, model.task
    tokens = vit.embeddings(images)[0]
    position = vit.embeddings.position_embeddings[0, :1]
    token = task.token()[0] + position
    memory = [part.memory for part in task.adapters[0].blocks.values()]
    found = []
    if not task.masked:
        tokens = torch.cat([token, tokens[1:]])
    for layer, own in zip(vit.layers, memory, strict=True):
        if task.masked:
            token, weights = slow_block(layer, token, torch.cat([tokens, token, own]))
            tokens, _ = slow_block(layer, tokens, tokens)
        else:
            tokens, weights = slow_block(layer, tokens, torch.cat([tokens, own]))
        found.append(weights[:, 0])
    last = vit.layernorm(token if task.masked else tokens[:1])
    return found, task.head(last).softmax(dim=-1)[0]


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("masked", [False, True])
def test_weights_are_those_of_attention_written_out(masked, kernel):
    backbone = BY_NAME["vit"].build()
    backbone.set_attn_implementation(kernel)
    model = build(masked=masked, backbone=backbone)
    images = BY_NAME["vit"].images(1)
    expected, probabilities = slow_weights(model, images)
    explanation = memtune.explain(model, images)
    assert explanation.masked is masked
    for block, mean, weights in zip(explanation.heads, explanation.blocks, expected, strict=True):
        first, patches, rest = weights.tensor_split([1, 17], dim=1)
        own, memory = rest.tensor_split([1], dim=1) if masked else (first, rest)
        torch.testing.assert_close(block.patches, patches.view(HEADS, 4, 4))
        torch.testing.assert_close(block.own, own)
        torch.testing.assert_close(block.memory, memory)
        torch.testing.assert_close(block.class_token, first if masked else first[:, :0])
        assert block.further.numel() == block.registers.numel() == block.earlier.numel() == 0
        torch.testing.assert_close(mean.memory, memory.mean(dim=0))
        torch.testing.assert_close(mean.patches, patches.mean(dim=0).view(4, 4))
    torch.testing.assert_close(explanation.probabilities, probabilities)
    assert explanation.label == LABELS[int(probabilities.argmax())]
    assert explanation.probability == pytest.approx(float(probabilities.max()))


HEAD_ONLY = MemoryConfig(0, class_token=False)


@pytest.mark.parametrize("name", ["vit", "deit", "beit", "dinov2_with_registers", "dinov3", "clip"])
def test_without_an_adapter_the_weights_are_those_that_transformers_gives(name):
    case = BY_NAME[name]
    backbone = case.build()
    images = case.images(1)
    blocks = memtune.explain(build(HEAD_ONLY, backbone=backbone), images).heads
    backbone.set_attn_implementation("eager")
    with torch.no_grad():
        expected = [each[0, :, 0] for each in case.run_tower(backbone, images, output_attentions=True).attentions]
    for block, weights in zip(blocks, expected, strict=True):
        own, registers, patches = weights.tensor_split([1, case.facts.prefix], dim=1)
        torch.testing.assert_close(block.own, own)
        torch.testing.assert_close(block.registers, registers)
        torch.testing.assert_close(block.patches.flatten(1), patches)


def test_a_task_token_that_has_learnt_nothing_divides_what_the_class_token_has_by_itself():
    """In the first block it is the class token once more: r / (1 + r_0) for the class token's weights r."""
    case = BY_NAME["vit"]
    backbone = case.build()
    model = memtune.wrap(backbone, MemoryConfig(0), labels=LABELS, masked=True)
    block = memtune.explain(model, case.images(1)).heads[0]
    backbone.set_attn_implementation("eager")
    with torch.no_grad():
        weights = backbone(case.images(1), output_attentions=True).attentions[0][0, :, 0]
    expected = weights / (1 + weights[:, :1])
    torch.testing.assert_close(block.patches.flatten(1), expected[:, 1:])
    torch.testing.assert_close(block.own, expected[:, :1])
    torch.testing.assert_close(block.class_token, expected[:, :1])


@each_mode
def test_every_backbone_is_explained_or_refused(case, masked):
    backbone = case.build()
    model = build(MemoryConfig(2), masked=masked, backbone=backbone)
    mean_pooled = case.facts.class_token is None or case.name in ("beit-head", "beit-shared", "beit-absolute")
    if case.facts.staged or (mean_pooled and not masked):
        why = "within windows" if case.facts.windowed else "to reduced maps" if case.facts.staged else "masked=True"
        with pytest.raises(UnsupportedBackboneError, match=why):
            memtune.explain(model, case.images(1))
        return
    before = snapshot(backbone)
    explanation = memtune.explain(model, case.images(1))
    assert_same(backbone, before)
    assert len(explanation.heads) == case.depth
    for block in explanation.heads:
        assert block.patches.shape == (2, 4, 4)
        assert block.memory.shape == (2, 2)
        assert block.own.shape == (2, 1)
        assert block.class_token.shape[1] + block.registers.shape[1] == case.facts.prefix - (not masked)
        torch.testing.assert_close(whole(block).sum(dim=-1), torch.ones(2), atol=1e-5, rtol=0)
        torch.testing.assert_close(sum(block.shares().values()), torch.ones(2), atol=1e-5, rtol=0)
    with torch.no_grad():
        answer = model(case.images(1)).logits.softmax(dim=-1)[0]
    torch.testing.assert_close(explanation.probabilities, answer)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method, masked):
    config, memory, further = METHODS[method]
    model = build(config, masked=masked).train()  # explained as in evaluation, and left in training
    images = BY_NAME["vit"].images(1)
    explanation = memtune.explain(model, images)
    assert model.training
    assert model.task.training
    for block in explanation.blocks:
        assert len(block.memory) == memory
        assert len(block.further) == further
        torch.testing.assert_close(whole(block).sum(), torch.ones(()), atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(explanation.probabilities, model.eval()(images).logits.softmax(dim=-1)[0])


def test_blocks_without_memory_and_earlier_tasks():
    backbone = BY_NAME["vit"].build()
    first = build(MemoryConfig(2), masked=True, backbone=backbone)
    earlier = memtune.combine(backbone, {"pets": first})
    model = build(MemoryConfig(3, blocks=[1]), masked=True, backbone=backbone, extends=earlier)
    explanation = memtune.explain(model, BY_NAME["vit"].images(1))
    assert [len(block.memory) for block in explanation.blocks] == [0, 3]
    for block in explanation.blocks:
        assert len(block.earlier) == 3  # the earlier task's token and its memory
        assert block.earlier.min() > 0
        torch.testing.assert_close(whole(block).sum(), torch.ones(()), atol=1e-5, rtol=0)


def test_a_model_of_several_tasks_is_explained_as_each_task_alone():
    backbone = BY_NAME["vit"].build()
    models = {
        "pets": build(MemoryConfig(2), masked=True, backbone=backbone),
        "flowers": build(MemoryConfig(4), masked=True, backbone=backbone),
        "signs": build(MemoryConfig(3), backbone=backbone),
    }
    both = memtune.combine(backbone, models)
    images = BY_NAME["vit"].images(1)
    for name, model in models.items():
        found, alone = memtune.explain(both, images, task=name), memtune.explain(model, images)
        answer = both(images)[name].logits.softmax(dim=-1)[0]
        torch.testing.assert_close(found.probabilities, answer)
        for block, expected in zip(found.heads, alone.heads, strict=True):
            torch.testing.assert_close(whole(block), whole(expected))


def test_images_go_through_the_processor():
    model = build(processor=processor())
    pixels = torch.randint(256, (50, 40, 3), dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy())
    pixel_values = processor()(image, return_tensors="pt").pixel_values
    found, expected = memtune.explain(model, image), memtune.explain(model, pixel_values)
    torch.testing.assert_close(found.probabilities, expected.probabilities)
    resized = torch.tensor(list(image.resize((32, 32), Image.Resampling.BILINEAR).tobytes())).view(32, 32, 3) / 255
    torch.testing.assert_close(found.image, resized, atol=1 / 255, rtol=0)


def test_larger_images():
    images = BY_NAME["vit"].images(1, size=48)
    explanation = memtune.explain(build(masked=True), images, interpolate_pos_encoding=True)
    assert explanation.blocks[0].patches.shape == (6, 6)
    assert explanation.image.shape == (48, 48, 3)


def test_half_precision():
    model = build(masked=True, backbone=BY_NAME["vit"].build().to(torch.bfloat16))
    for block in memtune.explain(model, BY_NAME["vit"].images(1)).blocks:
        assert block.memory.dtype == torch.float32
        torch.testing.assert_close(whole(block).sum(), torch.ones(()), atol=1e-2, rtol=0)


def test_wrong_images():
    model = build()
    image = Image.new("RGB", (40, 40))
    with pytest.raises(InputError, match="no image processor"):
        memtune.explain(model, image)
    with pytest.raises(InputError, match="got 2 images, expected one"):
        memtune.explain(model, [image, image])
    with pytest.raises(InputError, match="pixel_values of 2 images, expected one"):
        memtune.explain(model, BY_NAME["vit"].images(2))
    with pytest.raises(InputError, match="got str, expected a PIL image"):
        memtune.explain(model, "cat.png")
    with pytest.raises(InputError, match="expected a float tensor"):
        memtune.explain(model, BY_NAME["vit"].images(1)[0])
    with pytest.raises(InputError, match="interpolate_pos_encoding=True"):
        memtune.explain(model, BY_NAME["vit"].images(1, size=48))


def test_wrong_models_and_tasks():
    model, images = build(), BY_NAME["vit"].images(1)
    with pytest.raises(ConfigError, match="got 'pets' for a model of one task"):
        memtune.explain(model, images, task="pets")
    with pytest.raises(ConfigError, match="got ViTModel, expected a TunedModel"):
        memtune.explain(model.backbone, images)
    both = memtune.combine(model.backbone, {"pets": model})
    with pytest.raises(ConfigError, match=r"unknown tasks \['cars'\]; this model has \['pets'\]"):
        memtune.explain(both, images, task="cars")
    with pytest.raises(ConfigError, match=r"expected one of \['pets'\]"):
        memtune.explain(both, images)
    plain = build(ApproximatedPromptConfig(n=2), backbone=PLAIN[0].build())
    with pytest.raises(UnsupportedBackboneError, match="Swinv2Model, whose blocks"):
        memtune.explain(plain, PLAIN[0].images(1))


def items(number):
    images = BY_NAME["vit"].images(number)
    return [{"pixel_values": image, "labels": index % 3} for index, image in enumerate(images)]


@pytest.mark.parametrize("masked", [False, True])
def test_usage_is_the_mean_over_the_images(masked):
    model = build(MemoryConfig(3, blocks=[1]), masked=masked)
    dataset = items(5)
    usage = memory_usage(model, dataset, batch_size=2)
    each = [memtune.explain(model, item["pixel_values"][None]) for item in dataset]
    assert usage.images == 5
    for index, block in enumerate(usage.heads):
        mean = torch.stack([whole(explanation.heads[index]) for explanation in each]).mean(dim=0)
        torch.testing.assert_close(whole(block), mean, atol=1e-6, rtol=1e-5)
    rows = usage.rows()
    assert [row["block"] for row in rows] == [0, 1]
    assert "memory 0" not in rows[0]
    assert rows[1]["memory 2"] == pytest.approx(float(usage.blocks[1].memory[2]))
    for row in rows:
        assert sum(row.values()) - row["block"] == pytest.approx(1, abs=1e-5)
    text = str(usage)
    assert f"{100 * rows[1]['memory 2']:.2f}" in text
    assert "registers" not in text  # there are none
    uses = usage.least_used(2)
    assert [use.block for use in uses] == [1, 1]
    assert [use.attention for use in uses] == sorted(usage.blocks[1].memory.tolist())[:2]
    assert float(usage.blocks[1].memory[uses[0].token]) == uses[0].attention


def test_usage_of_a_task_among_several():
    model = build(MemoryConfig(2), masked=True)
    both = memtune.combine(model.backbone, {"pets": model})
    alone, among = memory_usage(model, items(3)), memory_usage(both, items(3), task="pets")
    torch.testing.assert_close(among.blocks[1].memory, alone.blocks[1].memory)


def test_usage_needs_memory_and_images():
    with pytest.raises(ConfigError, match=r"methods \['lora'\], which has no memory tokens"):
        memory_usage(build(LoraConfig(r=2)), items(2))
    with pytest.raises(ConfigError, match="no memory tokens"):
        memory_usage(build(HEAD_ONLY), items(2))
    with pytest.raises(InputError, match="empty"):
        memory_usage(build(), [])
    with pytest.raises(InputError, match="48 x 48"):
        memory_usage(build(), [{"pixel_values": BY_NAME["vit"].images(1, size=48)[0], "labels": 0}])


@pytest.mark.parametrize("config", [MemoryConfig(2, blocks=[1]), MemoryConfig(30), LoraConfig(r=2)])
@pytest.mark.slow
def test_pictures(config, tmp_path):
    model = build(config, masked=True)
    path = tmp_path / "attention.png"
    memtune.explain(model, BY_NAME["vit"].images(1)).save(path)
    assert_picture(path)
    if isinstance(config, MemoryConfig):
        memory_usage(model, items(2)).save(tmp_path / "usage.png")
        assert_picture(tmp_path / "usage.png")


def test_the_large_overlay_is_the_mean_over_the_blocks():
    """Each block counts alike, however much of its attention falls on patches."""
    blocks = memtune.explain(build(masked=True), BY_NAME["vit"].images(1)).blocks
    mean = mean_attention(blocks)
    for row in range(mean.shape[0]):
        for column in range(mean.shape[1]):
            shares = [float(block.patches[row, column]) / float(block.patches.sum()) for block in blocks]
            assert float(mean[row, column]) == pytest.approx(sum(shares) / len(shares), rel=1e-5)


def test_an_overlay_is_bright_where_the_attention_is():
    explanation = memtune.explain(build(masked=True), BY_NAME["vit"].images(1))
    explanation.heads[0].patches.zero_()[:, 1, 2] = 1.0
    picture = np.asarray(explanation.overlay(0), dtype=float).mean(axis=-1)
    assert min(picture.shape) >= 224
    rows, columns = explanation.heads[0].patches.shape[1:]
    blocks = picture.reshape(rows, picture.shape[0] // rows, columns, -1).mean(axis=(1, 3))
    assert np.unravel_index(blocks.argmax(), blocks.shape) == (1, 2)
    assert explanation.overlay().size == explanation.overlay(0).size


def assert_picture(path):
    """A PNG of a fair size that is not of one colour."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) > 300
        assert len(set(image.convert("RGB").resize((60, 60)).getcolors(3600))) > 20


def test_the_image_is_in_the_picture_in_its_own_colours(tmp_path):
    model = build(masked=True, processor=processor())
    path = tmp_path / "attention.png"
    memtune.explain(model, Image.new("RGB", (32, 32), "red")).save(path)
    with Image.open(path) as image:
        pixels = torch.tensor(list(image.convert("RGB").tobytes())).view(-1, 3)
    assert (pixels == torch.tensor([255, 0, 0])).all(dim=1).float().mean() > 0.02


def test_pictures_need_matplotlib(monkeypatch, tmp_path):
    explanation = memtune.explain(build(), BY_NAME["vit"].images(1))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MemtuneError, match="pip install matplotlib"):
        explanation.save(tmp_path / "attention.png")
    assert not list(tmp_path.iterdir())
