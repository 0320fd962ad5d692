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
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapter import Adapter, AdapterConfig
from ..backbones import Backbone
from ..errors import ConfigError
from ..registry import register_method
from ..streams import AdaptedStream, TaskStream

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

    def forward(self, states: Tensor, attended: Tensor) -> Tensor:
        """O' (batch, tokens, width) for X, `states`, and O, `attended`, of the same shape."""
        keys = self.prompts + self.prompts @ self.prompt_A @ self.prompt_B
        scores = self.dropout(self.activation(states @ keys.to(states.dtype).T))  # (batch, tokens, n)
        weight = scores.detach().amax(dim=-1, keepdim=True)
        term = weight * (scores @ self.prompts.to(scores.dtype))
        if self.prompt_gate is not None:
            term = self.prompt_gate.to(term.dtype) * term
        return self.prompt_scale.exp().to(attended.dtype) * (attended + term.to(attended.dtype))

    def change_output(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """A forward hook of an attention module."""
        states = args[0] if args else kwargs["hidden_states"]
        attended, *rest = output if isinstance(output, tuple) else (output,)
        changed = self(states, attended)
        return (changed, *rest) if isinstance(output, tuple) else changed


@register_method
class ApproximatedPromptAdapter(Adapter[ApproximatedPromptConfig]):
    """Approximated prompts for the blocks of one backbone; in masked mode only the task token gets their term."""

    config_class = ApproximatedPromptConfig
    needs_attention_function = False

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
            attention.register_forward_hook(prompts.change_output, with_kwargs=True)
