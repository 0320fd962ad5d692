"""A model answers by the values that are there at this moment, however they came there, and for its caller alone."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backbone_zoo import BY_NAME
from multitask import CONFIGS, tune, tune_all
from torch import Tensor, nn

import memtune

VIT = BY_NAME["vit"]
METHODS = ("memory", "lora", "dora", "softmax prompts", "coda", "all")
every_method = pytest.mark.parametrize("method", METHODS)
both_modes = pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])


def config_of(method: str, masked: bool) -> Any:
    return memtune.LoraConfig(r=2, use_dora=True, roles=("query", "fc1")) if method == "dora" else CONFIGS[method]


def tuned(method: str, masked: bool, backbone: Any = None) -> memtune.TunedModel:
    return tune(backbone or VIT.build(), config_of(method, masked), masked=masked)


def _copy_data(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn_like(parameter))  # no new version, as averages of weights are written


def _other_data(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter)


def _in_place(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))


def _loaded(module: nn.Module) -> None:
    module.load_state_dict({name: torch.randn_like(tensor) for name, tensor in module.state_dict().items()})


def _assigned(module: nn.Module) -> None:
    state = {name: torch.randn_like(tensor) for name, tensor in module.state_dict().items()}
    module.load_state_dict(state, assign=True)


WRITES: dict[str, Callable[[nn.Module], None]] = {
    "copied through data": _copy_data,
    "other data": _other_data,
    "in place": _in_place,
    "a state loaded": _loaded,
    "a state assigned": _assigned,
}
every_write = pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)


@torch.no_grad()
def answer(model: Any, autocast: bool = False) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return model(VIT.images()).logits.float()


@every_write
@every_method
@both_modes
def test_what_is_written_into_an_adapter_counts_at_the_next_pass(
    method: str, masked: bool, write: Callable[[nn.Module], None]
) -> None:
    model = tuned(method, masked)
    before = answer(model)
    for adapter in model.task.adapters:
        write(adapter)
    after = answer(model)
    fresh = memtune.wrap(model.backbone, config_of(method, masked), num_labels=3, masked=masked).eval()
    fresh.task.load_tensors(model.task.tensors())
    assert torch.equal(after, answer(fresh))
    assert (after - before).abs().max() > 1e-3


@every_write
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@both_modes
def test_what_is_written_into_the_backbone_counts_at_the_next_pass(
    masked: bool, autocast: bool, write: Callable[[nn.Module], None]
) -> None:
    backbone = VIT.build()
    model = tuned("all", masked, backbone)
    before = answer(model, autocast)
    write(backbone)
    backbone.requires_grad_(False)
    after = answer(model, autocast)
    fresh = memtune.wrap(backbone, CONFIGS["all"], num_labels=3, masked=masked).eval()
    fresh.task.load_tensors(model.task.tensors())
    assert torch.equal(after, answer(fresh, autocast))
    assert (after - before).abs().max() > 1e-3


@every_write
def test_what_is_written_into_a_task_of_many_counts_at_the_next_pass(write: Callable[[nn.Module], None]) -> None:
    backbone = VIT.build()
    kinds = [(name, masked) for name in ("memory", "lora", "prompts", "coda", "all") for masked in (False, True)]
    model = memtune.combine(backbone, tune_all(backbone, kinds))
    model(VIT.images())
    for task in model.arrangement.tasks.values():
        for adapter in task.adapters:
            write(adapter)
    output = model(VIT.images())
    for name, task in model.arrangement.tasks.items():
        fresh = memtune.wrap(backbone, task.configs, num_labels=len(task.labels), masked=task.masked).eval()
        fresh.task.load_tensors(task.tensors())
        torch.testing.assert_close(output[name].logits, answer(fresh), atol=1e-4, rtol=1e-4)


@every_method
@both_modes
def test_parameters_given_by_functional_call_are_used(method: str, masked: bool) -> None:
    model = tuned(method, masked)
    given = {name: value for name, value in model.named_parameters() if value.requires_grad}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, (VIT.images(),)).logits.square().sum()

    gradients = torch.func.grad(loss)({name: value.detach() for name, value in given.items()})
    loss(given).backward()
    for name, parameter in given.items():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-4, rtol=1e-4)
    assert any(gradients[name].abs().max() > 1e-3 for name in given if "adapters" in name)


@every_method
@both_modes
def test_a_replica_answers_by_its_own_tensors(method: str, masked: bool) -> None:
    """As `torch.nn.parallel.replicate` makes one: on another device its tensors are copies there."""
    model = tuned(method, masked)
    modules = list(model.modules())
    replicas: dict[nn.Module, Any] = {module: module._replicate_for_data_parallel() for module in modules}  # type: ignore[operator]
    for module, replica in replicas.items():
        replica._modules.update({name: replicas[child] for name, child in module._modules.items() if child is not None})
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.detach().clone())
    expected = answer(model)
    with torch.no_grad():
        assert torch.equal(replicas[model](VIT.images()).logits, expected)
        for module, replica in replicas.items():
            for name in module._parameters:
                if getattr(replica, name) is not None:
                    getattr(replica, name).add_(1)
        assert (replicas[model](VIT.images()).logits - expected).abs().max() > 1e-3
    assert torch.equal(answer(model), expected)


def test_a_replica_is_without_its_adapter_where_its_model_is() -> None:
    model = tuned("memory", masked=False)
    with model.disable_adapter():
        replica: Any = model._replicate_for_data_parallel()
    assert not replica._active
    assert model._replicate_for_data_parallel()._active


@both_modes
def test_train_and_eval_keep_the_views(masked: bool) -> None:
    model = tuned("all", masked)
    stream = model.stream
    for mode in (True, True, False, True, False):
        assert model.train(mode).stream is stream
        assert {module.training for module in model.task.modules()} == {mode}
        assert not any(module.training for module in model.backbone.modules())
    model.to(torch.float64).to(torch.float32)
    assert model.stream is stream


def test_views_are_made_anew_when_a_module_of_the_backbone_is_another() -> None:
    backbone = VIT.build()
    model = tuned("memory", masked=False, backbone=backbone)
    before = answer(model)
    first = backbone.layers[0].mlp
    backbone.layers[0].mlp = nn.Identity()
    model.eval()
    assert (answer(model) - before).abs().max() > 1e-3
    backbone.layers[0].mlp = first
    assert torch.equal(answer(model.eval()), before)


def test_only_activation_checkpointing_makes_a_difference_between_the_modes() -> None:
    model = tuned("memory", masked=False)
    model.activation_checkpointing_enable()
    training, answering = model.train().stream, model.eval().stream
    assert training is not answering
    model.activation_checkpointing_disable()
    assert model.train().stream is model.eval().stream


@pytest.mark.slow
@pytest.mark.parametrize("method", ["memory", "all"])
@both_modes
def test_it_is_compiled_once_however_often_its_mode_is_set(method: str, masked: bool) -> None:
    model = tuned(method, masked)
    torch._dynamo.reset()
    graphs = []
    step = torch.compile(model, backend=lambda graph, example: graphs.append(graph) or graph.forward)
    for _ in range(3):
        step.train()
        step(VIT.images(), labels=torch.tensor([0, 1])).loss.backward()
    assert len(graphs) == (2 if method == "all" and not masked else 1)  # that of the query is one of its own
    number = len(graphs)
    with torch.no_grad():
        expected = model.eval()(VIT.images()).logits
        for _ in range(2):
            step.eval()
            torch.testing.assert_close(step(VIT.images()).logits, expected, atol=1e-4, rtol=1e-4)
    assert len(graphs) <= 2 * number  # without gradients it is compiled once more


def test_an_adapter_is_off_in_the_callers_context_alone() -> None:
    model = tuned("memory", masked=False)
    own = answer(model)
    found: dict[str, Any] = {}

    def other() -> None:
        found["thread"] = answer(model)

    async def task() -> None:
        found["task"] = answer(model)

    async def within() -> None:
        waiting = asyncio.create_task(task())  # with the context of before
        with model.disable_adapter():
            await waiting
            found["inside"] = model(VIT.images())

    thread = threading.Thread(target=other)
    with model.disable_adapter(), model.disable_adapter():
        thread.start()
        thread.join()
    asyncio.run(within())
    assert torch.equal(found["thread"], own)
    assert torch.equal(found["task"], own)
    assert "last_hidden_state" in found["inside"]
    assert torch.equal(answer(model), own)


@both_modes
@pytest.mark.slow
def test_threads_that_answer_while_others_set_modes(masked: bool) -> None:
    model = tuned("all", masked)
    model.eval()
    expected, wrong, stop = answer(model), [], threading.Event()

    def ask() -> None:
        while not stop.is_set():
            try:
                if not torch.allclose(answer(model), expected, atol=1e-5):
                    wrong.append("another answer")
            except Exception as error:  # noqa: BLE001 - whatever a thread meets
                wrong.append(repr(error))

    def set_modes() -> None:
        for _ in range(50):
            model.train()
            model.eval()
            model._views = None  # as where they are made anew

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        set_modes()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert not wrong
