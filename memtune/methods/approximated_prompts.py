"""Approximated prompt tuning (APT).

"Approximated Prompt Tuning for Vision-Language Pre-trained Models" (Wu et al., https://arxiv.org/abs/2306.15706), as
its authors released it (https://github.com/DoubtedSteam/APT).

What attention to n prompt tokens P (n, D) would add is approximated beside the attention, which itself stays as it is.
With X (tokens, D) what goes into the attention module and O what comes out of its output projection:

    O' = exp(s) (O + w E),    E = S P,    S = act(X P~^T),    P~ = P + (P A) B,    w = max_j S_j, held constant

A (D, r) and B (r, D) stand for the projections of query and key. The scores S have one head and are not divided by
sqrt(D); s is a number. It starts with B = 0 and s = 0, so P~ = P, but O' is not O: for ViT-B and n = 200 the term has
a root mean square of about 0.19. A gate g, a number that starts at 0 and multiplies w E, is ours: O' = O at first.

Parameters: L (n D + 2 r D + 1) for L blocks of width D; a gate adds L. Multiply-adds: 2 T n D in each block for T
tokens, and 2 n r D once a pass for P~.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..backbones import Backbone
from ..errors import ConfigError
from ..streams import AdaptedStream, Stack, TaskStream, fit_rows, per_task
from .adapter import Adapter, AdapterConfig
from .registry import register_method

ACTIVATIONS = ("relu", "softmax")

PROMPT_STD, TRANSFORM_STD = 0.02, 1.0
"""Standard deviations of the initial P and A in the released code."""


@dataclass(frozen=True)
class ApproximatedPromptConfig(AdapterConfig):
    """Settings of approximated prompts; the defaults give the parameter counts of the paper's tables.

    Args:
        n: Prompt tokens in each block.
        r: Rank of the transform A B.
        activation: "relu", as released, for sparse scores whose strength w is unbounded; or "softmax", for attention
            over the prompts.
        gate: Multiply the term by a number that is trained from 0 on, so that a new adapter changes nothing. P and B
            then get a gradient from the second step on, A from the third.
        dropout: Probability of dropping a score while training.
        blocks: Indices of the blocks that get prompts; None for all, as in the paper.
    """

    method: ClassVar[str] = "approximated_prompts"

    n: int = 200
    r: int = 4
    activation: str = "relu"
    gate: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n", "r"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}: got {value!r}, expected a whole number from 1 on")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"activation: got {self.activation!r}, expected one of {ACTIVATIONS}")
        if not isinstance(self.gate, bool):
            raise ConfigError(f"gate: got {self.gate!r}, expected True or False")
        number = isinstance(self.dropout, (int, float)) and not isinstance(self.dropout, bool)
        if not number or not 0 <= self.dropout < 1 or math.isnan(self.dropout):
            raise ConfigError(f"dropout: got {self.dropout!r}, expected a probability below 1")


class BlockPrompts(nn.Module):
    """The approximated prompts of one block.

    Args:
        width: The block's width, D.
        config: The method's settings.
    """

    def __init__(self, width: int, config: ApproximatedPromptConfig) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.empty(config.n, width).normal_(std=PROMPT_STD))
        self.prompt_A = nn.Parameter(torch.empty(width, config.r).normal_(std=TRANSFORM_STD))
        self.prompt_B = nn.Parameter(torch.zeros(config.r, width))
        self.prompt_scale = nn.Parameter(torch.zeros(1))
        self.prompt_gate = nn.Parameter(torch.zeros(1)) if config.gate else None
        self.activation = nn.ReLU() if config.activation == "relu" else nn.Softmax(dim=-1)
        self.dropout = nn.Dropout(config.dropout)

    def keys(self) -> Tensor:
        """P~ (n, width)."""
        return self.prompts + self.prompts @ self.prompt_A @ self.prompt_B

    def forward(self, states: Tensor, attended: Tensor) -> Tensor:
        """O' (batch, tokens, width) for X, `states`, and O, `attended`, of the same shape."""
        scores = self.dropout(self.activation(states @ self.keys().to(states.dtype).T))  # (batch, tokens, n)
        mixed = scores @ self.prompts.to(scores.dtype)
        return _add_term(attended, scores, mixed, self.prompt_gate, self.prompt_scale.exp())


def _add_term(attended: Tensor, scores: Tensor, mixed: Tensor, gate: Tensor | None, scale: Tensor) -> Tensor:
    """O' of O, `attended`, from the scores of the prompts (..., n) and the prompts they mix (..., width)."""
    term = scores.detach().amax(dim=-1, keepdim=True) * mixed
    if gate is not None:
        term = gate.to(term.dtype) * term
    return scale.to(attended.dtype) * (attended + term.to(attended.dtype))


class PromptStack:
    """The prompts of several tasks in one block, all with the same activation.

    Args:
        stack: The tasks' parts.
    """

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._softmax = isinstance(stack.parts[0].activation, nn.Softmax)
        self._keys = stack.rows(lambda part: part.keys())  # (tasks, n, width)
        self._prompts = stack.rows(lambda part: part.prompts)
        self._scale = stack.rows(lambda part: part.prompt_scale.exp(), neutral=1.0)  # (tasks, 1)
        gates = (part.prompt_gate for part in stack.parts)
        gated = any(gate is not None for gate in gates)
        self._gate = stack.rows(_gate_or_one) if gated else None
        self._present = stack.present(lambda part: part.prompts) if self._softmax else None

    def __call__(self, states: Tensor, attended: Tensor) -> Tensor:
        """O' (rows, tokens, width), for each token or row by its task."""
        scores = per_task(states, self._spread(self._keys, states).mT)  # (rows, tokens, n)
        if self._present is not None:
            scores = scores.masked_fill(~self._spread(self._present, states), torch.finfo(scores.dtype).min)
        scores = scores.softmax(dim=-1) if self._softmax else scores.relu()
        mixed = per_task(scores, self._spread(self._prompts, states))
        gate = None if self._gate is None else self._spread(self._gate, states)
        return _add_term(attended, scores, mixed, gate, self._spread(self._scale, states))

    def _spread(self, rows: Tensor, states: Tensor) -> Tensor:
        return fit_rows(self._stack.chosen(rows), states.shape[0])


def _gate_or_one(part: BlockPrompts) -> Tensor:
    return torch.ones_like(part.prompt_scale) if part.prompt_gate is None else part.prompt_gate


def change_output(
    prompts: Callable[[Tensor, Tensor], Tensor], module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
) -> Any:
    """A forward hook of an attention module, when its first argument is given."""
    states = args[0] if args else kwargs["hidden_states"]
    attended, *rest = output if isinstance(output, tuple) else (output,)
    changed = prompts(states, attended)
    return (changed, *rest) if isinstance(output, tuple) else changed


@register_method
class ApproximatedPromptAdapter(Adapter[ApproximatedPromptConfig]):
    """Approximated prompts for the blocks of one backbone; in masked mode only the task token gets their term."""

    config_class = ApproximatedPromptConfig
    needs_attention_function = False
    stackable = True

    def __init__(self, config: ApproximatedPromptConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.blocks = nn.ModuleDict(
            {str(block.index): BlockPrompts(block.width, config) for block in config.select(backbone)}
        )

    def attach(self, stream: AdaptedStream | TaskStream) -> None:
        """Let each block's attention module give out what the prompts make of its output."""
        for index, prompts in self.blocks.items():
            assert isinstance(prompts, BlockPrompts)
            attention = stream.view.blocks[int(index)]["attention"]
            attention.register_forward_hook(partial(change_output, prompts), with_kwargs=True)

    @classmethod
    def attach_stack(cls, adapters: Sequence[Any], stream: AdaptedStream | TaskStream) -> None:
        """The same for several tasks, those with one activation after those with the other."""
        for activation in ACTIVATIONS:
            same = [each if each and each.config.activation == activation else None for each in adapters]
            for index, parts in cls.block_parts(same, stream.view.depth):
                attention = stream.view.blocks[index]["attention"]
                hook = partial(change_output, PromptStack(Stack(parts, stream.selection)))
                attention.register_forward_hook(hook, with_kwargs=True)
