"""Stacks: of one task the parameter itself, of several one tensor in which their parameters live."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memtune.streams import Selection, Stack
from memtune.streams.stacking import per_task


class Part(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.randn(number, 2))


def of_several(*numbers: int | None, trained: bool = False) -> tuple[Stack, list[Part]]:
    parts = [None if number is None else Part(number).requires_grad_(trained) for number in numbers]
    return Stack(parts, Selection()), [part for part in parts if part is not None]


def expected(parts: list[Part], largest: int) -> Tensor:
    """(1, tasks, largest, 2), as for all tasks of every image."""
    padded = [torch.cat([part.values, torch.zeros(largest - len(part.values), 2)]) for part in parts]
    return torch.stack(padded).unsqueeze(0)


def test_of_one_task_it_is_the_parameter_itself() -> None:
    part = Part(3)
    stacked = Stack([part], Selection()).tensor("values")
    assert stacked() is part.values
    part.values = nn.Parameter(torch.zeros(1, 2))
    assert stacked() is part.values
    with torch.no_grad():
        assert not stacked().requires_grad
        assert stacked().data_ptr() == part.values.data_ptr()


def test_of_several_the_parameters_are_parts_of_one_tensor() -> None:
    stack, parts = of_several(3, 1, 2)
    before = [part.values.clone() for part in parts]
    values = stack.tensor("values")()
    torch.testing.assert_close(values, expected(parts, 3), rtol=0, atol=0)
    assert all(torch.equal(part.values, each) for part, each in zip(parts, before, strict=True))
    assert len({part.values.untyped_storage().data_ptr() for part in parts}) == 1
    present = stack.present("values")
    assert present is not None
    assert present()[0].sum(dim=-1).tolist() == [3, 1, 2]


def test_a_task_without_a_part_is_neutral() -> None:
    stack, (part,) = of_several(None, 2)
    neutral, own = stack.tensor("values", neutral=1.0)()[0]
    assert torch.equal(own, part.values)
    assert torch.equal(neutral, torch.ones(2, 2))
    assert not stack.complete


WRITES: dict[str, Callable[[Part], Any]] = {
    "in place": lambda part: part.values.add_(1),
    "through data": lambda part: part.values.data.mul_(3),
    "one value through data": lambda part: part.values.data[0, 1].fill_(7),
    "through numpy": lambda part: part.values.detach().numpy().fill(4),
    "other data": lambda part: setattr(part.values, "data", torch.full_like(part.values, 5)),
    "another parameter": lambda part: setattr(part, "values", nn.Parameter(torch.full((2, 2), 6.0), False)),
    "a state loaded": lambda part: part.load_state_dict({"values": torch.full((2, 2), 8.0)}),
    "a state assigned": lambda part: part.load_state_dict({"values": torch.full((2, 2), 9.0)}, assign=True),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("made", [False, True], ids=["stacked", "made of it"])
def test_what_is_written_into_a_parameter_is_in_the_stack(write: Callable[[Part], Any], made: bool) -> None:
    stack, parts = of_several(2, 2)
    stacked = stack.made(lambda values: values * 2, "values") if made else stack.tensor("values")
    with torch.no_grad():
        stacked()
        write(parts[1])
        stack.refresh()
        factor = 2 if made else 1
        torch.testing.assert_close(stacked(), factor * expected(parts, 2), rtol=0, atol=0)


def test_what_is_made_is_kept() -> None:
    for stack in (of_several(2, 2)[0], Stack([Part(2)], Selection())):
        made = []
        stacked = stack.made(lambda values, made=made: made.append(1) or values + 1, "values")
        with torch.no_grad():
            for _ in range(3):
                stack.refresh()
                stacked()
        assert len(made) == 1
        stacked()  # with gradients it is made anew
        assert len(made) == (1 if stack.alone is None else 2)


def test_several_tasks_get_gradients_of_their_own() -> None:
    stack, parts = of_several(2, None, 1, trained=True)
    factors = torch.randn(1, 3, 2, 2)
    (stack.tensor("values")() * factors).sum().backward()
    torch.testing.assert_close(parts[0].values.grad, factors[0, 0])
    torch.testing.assert_close(parts[1].values.grad, factors[0, 2, :1])


def test_a_copy_of_a_part_lives_elsewhere() -> None:
    stack, parts = of_several(2, 2)
    stack.tensor("values")()
    copied = copy.deepcopy(parts[0])
    copied.values.data.fill_(3)
    assert not torch.equal(copied.values, parts[0].values)


def test_parts_of_several_types_and_of_inference_mode_are_stacked_all_the_same() -> None:
    with torch.inference_mode():
        parts = [Part(2).requires_grad_(False), Part(2).requires_grad_(False).bfloat16()]
        stack = Stack(parts, Selection())
        stacked = stack.tensor("values")
        stacked()
        parts[0].values.fill_(2)
        stack.refresh()
        torch.testing.assert_close(stacked()[0], torch.stack([part.values.float() for part in parts]))
        assert parts[1].values.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_products_of_states_with_their_tasks_matrices(shape: tuple[int, int]) -> None:
    states, weights = torch.randn(2, 3, 4), torch.randn(*shape, 4, 5)
    slow = torch.einsum("ntd,ntde->nte", states, weights.expand(2, 3, -1, -1))
    torch.testing.assert_close(per_task(states, weights), slow)
    torch.testing.assert_close(per_task(states, weights[0, 0]), states @ weights[0, 0])
