"""LoRA: equal to peft's own in unmasked mode, to the formulas written out slowly in masked mode."""

from __future__ import annotations

import copy
import math
import pickle

import peft
import pytest
import torch
from backbone_zoo import BY_NAME, FAMILIES, GLOBAL, assert_same, each, frozen, outputs_equal, snapshot
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTModel

from memtune import wrap
from memtune.backbones.backbone import Backbone
from memtune.errors import ConfigError
from memtune.methods import LoraConfig, MemoryConfig
from memtune.methods.lora import LoraAdapter
from memtune.methods.registry import as_config, read_config
from memtune.streams.passes import Pass

VIT = BY_NAME["vit"]
ROLES = ("query", "key", "value", "out", "fc1", "fc2")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "mlp.fc1", "mlp.fc2", "mlp.up_proj", "mlp.down_proj"]
KINDS = {
    "plain": {"lora_alpha": 6},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True, "lora_alpha": 5},
    "both": {"use_dora": True, "use_rslora": True},
}


def tune(case, config, *, masked=False, num_labels=4, backbone=None):
    return wrap(backbone or case.build(), config, num_labels=num_labels, masked=masked).eval()


def scramble(tuned, seed=7):
    """Give every trained value another one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.task.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return tuned


def peft_model(case, targets=TARGETS, **settings):
    """The model with peft's own layers, and those layers by block and role."""
    model = peft.get_peft_model(case.build(), peft.LoraConfig(target_modules=targets, r=3, **settings)).eval()
    plain = model.base_model.model
    return plain, [{role: block[role] for role in ROLES} for block in Backbone(plain).blocks]


def copy_to_peft(tuned, layers):
    tensors = tuned.task.tensors()
    with torch.no_grad():
        for index, roles in enumerate(layers):
            for role, layer in roles.items():
                layer.lora_A["default"].weight.copy_(tensors[f"blocks.{index}.{role}.lora_A"])
                layer.lora_B["default"].weight.copy_(tensors[f"blocks.{index}.{role}.lora_B"])
                if layer.lora_magnitude_vector:
                    layer.lora_magnitude_vector["default"].weight.copy_(
                        tensors[f"blocks.{index}.{role}.lora_magnitude"]
                    )


def peft_features(case, plain, images):
    return case.facts.feature(case.tower(plain), case.run_tower(plain, images))


# Unmasked: peft's own.


@each(FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_features_equal_pefts_for_copied_weights(case, kind):
    tuned = scramble(tune(case, LoraConfig(r=3, roles=ROLES, **KINDS[kind])))
    plain, layers = peft_model(case, **KINDS[kind])
    copy_to_peft(tuned, layers)
    images = case.images()
    torch.testing.assert_close(tuned.features(images), peft_features(case, plain, images), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_dropout_is_pefts_while_training_and_off_in_evaluation(kind):
    tuned = scramble(tune(VIT, LoraConfig(r=3, roles=ROLES, lora_dropout=0.4, **KINDS[kind])))
    plain, layers = peft_model(VIT, lora_dropout=0.4, **KINDS[kind])
    copy_to_peft(tuned, layers)
    images = VIT.images()
    still = tuned.features(images)
    torch.testing.assert_close(still, peft_features(VIT, plain, images), atol=1e-6, rtol=1e-6)
    tuned.train(), plain.train()
    torch.manual_seed(3)
    dropped = tuned.features(images)
    torch.manual_seed(3)
    torch.testing.assert_close(dropped, peft_features(VIT, plain, images), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(dropped, still)
    assert torch.equal(tuned.eval().features(images), still)


def test_gradients_equal_pefts():
    tuned = scramble(tune(VIT, LoraConfig(r=3, roles=ROLES, use_dora=True)))
    plain, layers = peft_model(VIT, use_dora=True)
    copy_to_peft(tuned, layers)
    tuned.features(VIT.images()).square().sum().backward()
    peft_features(VIT, plain, VIT.images()).square().sum().backward()
    gradients = {key: parameter.grad for key, parameter in tuned.task.adapters[0].named_parameters()}
    for index, roles in enumerate(layers):
        for role, layer in roles.items():
            for name, part in [("lora_A", layer.lora_A), ("lora_B", layer.lora_B)]:
                torch.testing.assert_close(gradients[f"blocks.{index}.{role}.{name}"], part["default"].weight.grad)


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_initial_values_are_distributed_as_pefts(init):
    case = VIT
    adapter = LoraAdapter(LoraConfig(r=4, roles=ROLES, init_lora_weights=init), Backbone(case.build()))
    for key, tensor in adapter.state_dict().items():
        if key.endswith("lora_B"):
            assert not tensor.any()
        elif init == "gaussian":
            assert 0.5 / 4 < tensor.std() < 2 / 4
        else:
            assert tensor.abs().max() <= math.sqrt(1 / tensor.shape[1])


# What the adapter owns.


@pytest.mark.parametrize("dora", [False, True])
@each([BY_NAME["vit"], BY_NAME["clip-head"], BY_NAME["swin"], BY_NAME["dinov3-gated"]])
def test_keys_are_roles_and_the_count_is_the_formula(case, dora):
    backbone = case.build()
    tuned = tune(case, LoraConfig(r=3, roles=ROLES, use_dora=dora), backbone=backbone)
    parts = ["lora_A", "lora_B"] + ["lora_magnitude"] * dora
    expected = {f"blocks.{index}.{role}.{part}" for index in range(case.depth) for role in ROLES for part in parts}
    assert set(tuned.task.tensors()) == expected | {"head.weight", "head.bias"}
    layers = [block[role] for block in Backbone(backbone).blocks for role in ROLES]
    count = sum(3 * (layer.in_features + layer.out_features) + dora * layer.out_features for layer in layers)
    assert tuned.trainable_parameters()["lora"] == count
    assert count == sum(parameter.numel() for parameter in tuned.task.adapters[0].parameters())


@pytest.mark.parametrize("masked", [False, True])
def test_default_roles_and_rank_depend_on_the_mode(masked):
    tuned = tune(VIT, LoraConfig(), masked=masked)
    assert tuned.task.configs[0].roles == (ROLES if masked else ("query", "value"))
    assert tuned.task.configs[0].r == (4 if masked else 8)
    assert read_config(tuned.task.configs[0].to_dict()) == tuned.task.configs[0]


@pytest.mark.parametrize("masked", [False, True])
def test_only_the_chosen_blocks_and_roles_change(masked):
    tuned = tune(VIT, LoraConfig(r=2, roles=["fc2", "key"], blocks=[-1]), masked=masked)
    keys = {key for key in tuned.task.tensors() if key.startswith("blocks")}
    assert keys == {f"blocks.1.{role}.lora_{part}" for role in ("key", "fc2") for part in "AB"}
    assert tuned.task.configs[0].roles == ("key", "fc2")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal"])
@pytest.mark.parametrize("dora", [False, True])
def test_fresh_adapter_of_every_kind_leaves_the_output_unchanged(masked, init, dora):
    assert_unchanged(VIT, masked, LoraConfig(r=4, init_lora_weights=init, use_dora=dora, roles=("query", "out", "fc1")))


def assert_unchanged(case, masked, config):
    tuned = tune(case, config, masked=masked)
    bare = tune(case, [], masked=masked, backbone=tuned.backbone)
    bare.task.load_state_dict({k: v for k, v in tuned.task.state_dict().items() if not k.startswith("adapters")})
    torch.testing.assert_close(tuned(case.images()).logits, bare(case.images()).logits, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_views_are_rebuilt_copied_pickled_loaded_and_cast(masked):
    images = VIT.images()
    tuned = scramble(tune(VIT, LoraConfig(r=2, use_dora=not masked), masked=masked))
    before = tuned(images).logits
    state = torch.get_rng_state()
    for _ in range(3):
        tuned.train()
        tuned.eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(tuned(images).logits, before)
    for other in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):
        assert torch.equal(other(images).logits, before)
        assert not torch.equal(scramble(other)(images).logits, before)
    assert torch.equal(tuned(images).logits, before)
    fresh = tune(VIT, LoraConfig(r=2, use_dora=not masked), masked=masked)
    fresh.load_state_dict(tuned.state_dict())
    assert torch.equal(fresh(images).logits, before)
    fresh.load_state_dict(scramble(copy.deepcopy(tuned)).state_dict(), assign=True)
    fresh.eval()
    assert torch.equal(fresh(images).logits, scramble(copy.deepcopy(tuned))(images).logits)
    torch.testing.assert_close(tuned.double()(images.double()).logits.float(), before, atol=1e-5, rtol=1e-5)


# Masked: the formulas.


def slow_stream(model, tensors, images, scale):
    """Masked LoRA on a ViT, in loops over images, heads and tokens, from the paper's formula and ours."""

    def updated(block, role, states, part=None):
        change = (
            scale * (states @ tensors[f"blocks.{block}.{role}.lora_A"].T) @ tensors[f"blocks.{block}.{role}.lora_B"].T
        )
        return (states if part is None else part) + change

    embedded = model.embeddings(images)
    first = tensors["class_token"] + model.embeddings.position_embeddings[:, :1]
    logits = []
    for hidden in embedded:  # (tokens, width)
        token = first[0, 0]
        for index, layer in enumerate(model.layers):
            attention, normed = layer.attention, layer.layernorm_before(hidden)
            own = layer.layernorm_before(token)
            query = updated(index, "query", own, attention.q_proj(own))
            seen = torch.cat([normed, own[None]])
            *key, own_key = attention.k_proj(seen)
            *value, own_value = attention.v_proj(seen)
            key = [*(updated(index, "key", each) for each in key), own_key]  # the updates are of what the trunk has
            value = [*(updated(index, "value", each) for each in value), own_value]
            context = []
            for head in range(2):
                columns = slice(8 * head, 8 * head + 8)
                scores = torch.stack([query[columns] @ each[columns] for each in key]) / math.sqrt(8)
                weights = scores.softmax(0)
                context.append(sum(weight * each[columns] for weight, each in zip(weights, value, strict=True)))
            context = torch.cat(context)
            token = token + updated(index, "out", context, attention.o_proj(context))
            own = layer.layernorm_after(token)
            inner = nn.functional.gelu(updated(index, "fc1", own, layer.mlp.fc1(own)))
            token = token + updated(index, "fc2", inner, layer.mlp.fc2(inner))
            hidden = layer(hidden[None])[0]
        logits.append(tensors["head.weight"] @ model.layernorm(token) + tensors["head.bias"])
    return torch.stack(logits)


@torch.no_grad()
def test_masked_equals_the_formula_written_out():
    tuned = scramble(tune(VIT, LoraConfig(r=3, lora_alpha=4), masked=True))
    expected = slow_stream(tuned.backbone, tuned.task.tensors(), VIT.images(3), scale=4 / 3)
    torch.testing.assert_close(tuned(VIT.images(3)).logits, expected, atol=1e-5, rtol=1e-5)


def updated(factors, states):
    """K' or V', (batch, heads, tokens, head width)."""
    down, up = factors.scaled()
    merged = states.transpose(1, 2).flatten(2)  # (batch, tokens, width)
    return (merged + merged @ down.T @ up.T).unflatten(2, (states.shape[1], -1)).transpose(1, 2)


def slow_scores(site, trunk, query):
    key = trunk.key
    key = key + sum(updated(update._key, key) - key for update in site.updates if update._key)
    return query @ key.mT + (0 if trunk.bias is None else trunk.bias)


def slow_context(site, trunk, weights):
    value = trunk.value
    changes = [updated(update._value, value) - value for update in site.updates if update._value]
    return weights @ (value + sum(changes))


@pytest.fixture
def slow(monkeypatch):
    """A function after which K' and V' are computed."""

    def patch():
        monkeypatch.setattr("memtune.streams.attention._trunk_scores", slow_scores)
        monkeypatch.setattr("memtune.streams.attention._trunk_context", slow_context)

    return patch


@each([case for case in GLOBAL if case in FAMILIES])
def test_folded_keys_and_values_equal_the_slow_formula(case, slow):
    assert_folded_equals_slow(case, ROLES, "sdpa", slow)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("roles", [ROLES, ("key",), ("value",)], ids="+".join)
@each([BY_NAME["vit"], BY_NAME["beit"]])
def test_folding_either_role_equals_the_slow_formula(case, roles, attention, slow):
    assert_folded_equals_slow(case, roles, attention, slow)


def assert_folded_equals_slow(case, roles, attention, slow):
    backbone = case.build()
    backbone.set_attn_implementation(attention)
    several = [LoraConfig(r=3, roles=roles), MemoryConfig(2)]
    tuned = scramble(tune(case, several, masked=True, backbone=backbone))
    folded = tuned(case.images()).logits
    slow()
    torch.testing.assert_close(folded, tuned.eval()(case.images()).logits, atol=2e-5, rtol=2e-5)


def test_folding_composes_for_ranks_of_their_own(slow):
    ranks = [LoraConfig(r=3, roles=("key",)), LoraConfig(r=5, roles=("value",)), LoraConfig(r=2, roles=("query",))]
    tuned = scramble(tune(VIT, ranks, masked=True))
    folded = tuned(VIT.images()).logits
    slow()
    torch.testing.assert_close(folded, tuned.eval()(VIT.images()).logits, atol=1e-5, rtol=1e-5)


def test_dropout_acts_on_what_the_task_sees():
    tuned = scramble(tune(VIT, LoraConfig(r=3, roles=("key", "value"), lora_dropout=0.5), masked=True)).train()
    first, second = tuned(VIT.images()).logits, tuned(VIT.images()).logits
    assert not torch.allclose(first, second)
    assert torch.equal(tuned.eval()(VIT.images()).logits, tuned(VIT.images()).logits)


@each(GLOBAL)
def test_the_trunk_stays_bit_for_bit(case):
    backbone = case.build()
    before, images = snapshot(backbone), case.images()
    with frozen(backbone):  # as the trunk runs: SDPA has other kernels for gradients
        expected = case.run_tower(backbone, images)
    tuned = scramble(tune(case, [LoraConfig(r=3), MemoryConfig(2)], masked=True, backbone=backbone)).train()
    tuned(images).logits.sum().backward()
    _, output = tuned._trunk.run(images)
    assert outputs_equal(output, expected)
    with torch.no_grad():
        assert outputs_equal(case.run_tower(backbone, images), expected)
    assert_same(tuned.detach(), before)


@pytest.mark.slow
def test_one_more_task_costs_under_one_percent_of_vit_b16():
    backbone = ViTModel(ViTConfig(), add_pooling_layer=False).eval()
    backbone.set_attn_implementation("eager")  # whose products are all counted
    tuned = wrap(backbone, [MemoryConfig(4), LoraConfig(r=8)], num_labels=100, masked=True).eval()
    images = torch.randn(8, 3, 224, 224)

    def flops(function):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            function()
        return counter.get_total_flops()

    assert flops(lambda: tuned(images)) / flops(lambda: backbone(images)) < 1.009


# Together with memory.


@each([BY_NAME["vit"], BY_NAME["dinov2"], BY_NAME["swin"]])
def test_memory_goes_through_the_adapted_projections(case):
    tuned = scramble(tune(case, [MemoryConfig(2), LoraConfig(r=2, roles=("key", "value"))]))
    tensors, block = tuned.task.tensors(), Backbone(tuned.backbone).blocks[0]
    memory = block["norm1"](tensors["blocks.0.memory"])
    (source,) = tuned.stream.sites[0].sources
    for role, got in zip(("key", "value"), source(tuned.stream.view.blocks[0], Pass())[:2], strict=True):
        down, up = tensors[f"blocks.0.{role}.lora_A"], tensors[f"blocks.0.{role}.lora_B"]
        expected = block[role](memory) + 4 * memory @ down.T @ up.T
        torch.testing.assert_close(got[0].transpose(1, 2).flatten(2)[0], expected)


@pytest.mark.parametrize("masked", [False, True])
def test_memory_and_lora_both_matter(masked):
    tuned = scramble(tune(VIT, [MemoryConfig(2), LoraConfig(r=2)], masked=masked))
    before = tuned(VIT.images()).logits
    for adapter in tuned.task.adapters:
        saved = copy.deepcopy(adapter.state_dict())
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.mul_(-1.5)
        assert not torch.allclose(tuned(VIT.images()).logits, before)
        adapter.load_state_dict(saved)


def test_the_same_role_twice_is_refused():
    with pytest.raises(ConfigError, match=r"blocks\.0\.value\.lora_A"):
        tune(VIT, [LoraConfig(), LoraConfig(r=2, roles=("value",))])


# Settings.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r: got 0"),
        ({"r": True}, "r: got True"),
        ({"r": 2.0}, "r: got 2.0"),
        ({"lora_alpha": 0}, "lora_alpha: got 0"),
        ({"lora_alpha": 10**400}, "lora_alpha: got 1000"),
        ({"lora_alpha": math.nan}, "lora_alpha: got nan"),
        ({"lora_alpha": "8"}, "lora_alpha: got '8'"),
        ({"lora_dropout": 1.0}, "lora_dropout: got 1.0"),
        ({"use_dora": 1}, "use_dora: got 1"),
        ({"use_rslora": None}, "use_rslora: got None"),
        ({"init_lora_weights": "pissa"}, "change the frozen weight"),
        ({"init_lora_weights": 1}, "init_lora_weights: got 1"),
        ({"init_lora_weights": None}, "init_lora_weights: got None"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "even rank"),
        ({"roles": "query"}, "roles: got 'query'"),
        ({"roles": ()}, r"roles: got \(\)"),
        ({"roles": ("query", "query")}, "each once"),
        ({"roles": ("q_proj",)}, "roles: got"),
        ({"blocks": "all"}, "blocks: got"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**settings)


def test_dora_has_no_meaning_for_the_keys_that_a_task_sees():
    backbone = VIT.build()
    before = snapshot(backbone)
    with pytest.raises(ConfigError, match="use_dora"):
        wrap(backbone, LoraConfig(use_dora=True), num_labels=2, masked=True)
    assert_same(backbone, before)
    scramble(tune(VIT, LoraConfig(use_dora=True, roles=("query", "out", "fc1", "fc2")), masked=True))(VIT.images())


@pytest.mark.parametrize(
    ("targets", "roles"),
    [
        (["q_proj", "v_proj"], ("query", "value")),
        (["query", "value"], ("query", "value")),
        (["attention.attention.key"], ("key",)),
        (["self.query", "k_proj"], ("query", "key")),
        (["o_proj"], ("out",)),
        (["out_proj", "fc1", "fc2"], ("out", "fc1", "fc2")),
        (["attention.output.dense"], ("out",)),
        (["intermediate.dense"], ("fc1",)),
        (["output.dense"], ("out", "fc2")),
        (["dense"], ("out", "fc1", "fc2")),
        (["up_proj", "mlp.down_proj"], ("fc1", "fc2")),
        ("all-linear", ROLES),
        (None, None),
    ],
    ids=str,
)
def test_target_modules_stand_for_roles(targets, roles):
    assert LoraConfig.from_peft(peft.LoraConfig(target_modules=targets)).roles == roles


def test_a_peft_config_is_taken():
    given = peft.LoraConfig(
        r=4, lora_alpha=2, target_modules=["query"], lora_dropout=0.1, use_rslora=True, layers_to_transform=[1],
        modules_to_save=["classifier"], task_type="FEATURE_EXTRACTION",
    )  # fmt: skip
    expected = LoraConfig(r=4, lora_alpha=2, roles=("query",), lora_dropout=0.1, use_rslora=True, blocks=(1,))
    assert as_config(given) == expected
    assert tune(VIT, given).task.configs == [expected]
    assert tune(VIT, [MemoryConfig(1), given]).task.methods == ["memory", "lora"]
    back = expected.to_peft(target_modules=["query"])
    assert (back.r, back.lora_alpha, back.lora_dropout, back.use_rslora) == (4, 2, 0.1, True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_proj", "nothing", "layernorm"]}, r"\['layernorm', 'nothing'\]"),
        ({"target_modules": "q_.*"}, "q_"),
        ({"target_modules": ["vit.layers.0.attention.q_proj"]}, "layers_to_transform"),
        ({"bias": "all"}, "bias"),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern"),
        ({"modules_to_save": ["classifier", "layernorm"]}, "layernorm"),
        ({"init_lora_weights": "olora"}, "frozen weight"),
        ({"lora_bias": True}, "lora_bias"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["layers.0"]}, "exclude_modules"),
    ],
    ids=str,
)
def test_what_peft_can_and_memtune_cannot_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        LoraConfig.from_peft(peft.LoraConfig(**settings))


def test_values_that_are_no_configuration_are_refused():
    for value in ("lora", 3, None, peft.IA3Config()):
        with pytest.raises(ConfigError, match="expected a configuration"):
            wrap(VIT.build(), value, num_labels=2)


@pytest.mark.slow
def test_four_bit_linears_equal_pefts():
    quantised = pytest.importorskip("bitsandbytes").nn.Linear4bit

    def build():
        model = ViTModel(VIT.config(hidden_size=64, intermediate_size=64)).eval()
        for block in Backbone(model).blocks:
            for role in ROLES:
                layer = quantised(64, 64, compute_dtype=torch.float32)
                layer.support_avx512bf16_for_cpu = False  # as in memtune's views: another kernel rounds otherwise
                block.replace(role, layer.requires_grad_(False).to("cpu"))
        return model

    torch.manual_seed(0)
    tuned = scramble(wrap(build(), LoraConfig(r=3, roles=ROLES), num_labels=2).eval())
    torch.manual_seed(0)
    plain = peft.get_peft_model(build(), peft.LoraConfig(r=3, target_modules=TARGETS)).eval().base_model.model
    copy_to_peft(tuned, [{role: block[role] for role in ROLES} for block in Backbone(plain).blocks])
    torch.testing.assert_close(tuned.features(VIT.images()), plain(VIT.images()).last_hidden_state[:, 0])
