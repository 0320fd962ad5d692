"""What is made of tensors is made once, and again whenever one of them has changed, in whatever way."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memtune.keeping import Kept


def counted() -> tuple[Kept[Tensor], list[int]]:
    made: list[int] = []

    def make(*tensors: Tensor) -> Tensor:
        made.append(len(tensors))
        return torch.stack([tensor.detach().double().sum() for tensor in tensors])

    return Kept(make), made


CHANGES: dict[str, Callable[[nn.Linear], Any]] = {
    "in place": lambda layer: layer.weight.detach().add_(1),
    "through data": lambda layer: layer.weight.data.copy_(torch.ones(3, 2)),
    "one value through data": lambda layer: layer.weight.data[2, 1].fill_(7),
    "two values exchanged through data": lambda layer: layer.weight.data.copy_(layer.weight.data.flip(0)),
    "through numpy": lambda layer: layer.weight.detach().numpy().fill(5),
    "other data": lambda layer: setattr(layer.weight, "data", torch.ones(3, 2)),
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach().clone() + 1)),
    "a state loaded": lambda layer: layer.load_state_dict({"weight": torch.ones(3, 2), "bias": torch.ones(3)}),
    "a state assigned": lambda layer: layer.load_state_dict(
        {"weight": torch.ones(3, 2), "bias": torch.ones(3)}, assign=True
    ),
    "another type": lambda layer: layer.to(torch.bfloat16),
    "inference mode": lambda layer: _in_inference_mode(layer),
}


@torch.inference_mode()
def _in_inference_mode(layer: nn.Linear) -> None:
    layer.weight.add_(1)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_way_of_writing_a_value_is_noticed(change: Callable[[nn.Linear], Any]) -> None:
    layer = nn.Linear(2, 3)
    kept, made = counted()
    kept.of([layer.weight, layer.bias])
    kept.of([layer.weight, layer.bias])
    assert made == [2]
    change(layer)
    expected = torch.stack([tensor.detach().double().sum() for tensor in (layer.weight, layer.bias)])
    assert torch.equal(kept.of([layer.weight, layer.bias]), expected)
    assert made == [2, 2]
    kept.of([layer.weight, layer.bias])
    assert made == [2, 2]


def test_another_state_or_number_of_tensors_is_another_thing() -> None:
    one, other = torch.ones(2), torch.ones(2)
    kept, made = counted()
    for tensors, state in (([one], "a"), ([one], "b"), ([one, other], "b"), ([other, one], "b")):
        kept.of(tensors, state=state)
    assert made == [1, 1, 2, 2]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(4, 6).T,
        torch.ones(3, dtype=torch.bfloat16),
        torch.zeros(0, 3),
        torch.tensor(2.0),
        torch.ones(2, dtype=torch.bool),
    ],
    ids=["not in one piece", "bfloat16", "empty", "a number", "truth"],
)
def test_any_tensor_of_the_cpu_is_kept_and_watched(tensor: Tensor) -> None:
    kept, made = counted()
    kept.of([tensor])
    kept.of([tensor])
    assert len(made) == 1
    if tensor.numel():
        tensor.data[(0,) * tensor.ndim] = 0
        kept.of([tensor])
        assert len(made) == 2


def test_what_cannot_be_watched_is_made_each_time() -> None:
    made: list[Tensor] = []
    kept = Kept(lambda tensor: made.append(tensor))
    for _ in range(2):
        kept.of([torch.empty(2, device="meta")])
    assert len(made) == 2


def test_nothing_that_is_gone_stays_alive() -> None:
    kept = Kept(lambda tensor: tensor.clone())
    tensor = torch.ones(2)
    first = weakref.ref(kept.of([tensor]))
    tensor.add_(1)
    kept.of([tensor])
    assert first() is None  # at once, without the collector
    gc.collect()


def test_threads_get_what_is_made_of_their_own_tensors() -> None:
    kept = Kept(lambda tensor: float(tensor.sum()))
    wrong: list[float] = []

    def ask(value: float) -> None:
        tensor = torch.full((2,), value)
        wrong.extend(found for found in (kept.of([tensor]) for _ in range(200)) if found != 2 * value)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=ask, args=(float(number),)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
