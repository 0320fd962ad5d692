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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..backbones import Backbone
from ..errors import ConfigError
from ..streams import Stack, Stream, fit_rows, per_task
from .adapter import Adapter, AdapterConfig
from .registry import register_method

ACTIVATIONS = ("relu", "softmax")

PROMPT_STD, TRANSFORM_STD = 0.02, 1.0
"""Standard deviations of the initial P and A in the released code."""


@dataclass(frozen=True)
class ApproximatedPromptConfig(AdapterConfig):
    """Settings of approximated prompts; the defaults give the parameter counts of the paper's tables.

    Example:
        >>> model = memtune.wrap(backbone, memtune.ApproximatedPromptConfig(), labels=["cat", "dog"])

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
        self.dropout = nn.Dropout(config.dropout)


class _Terms:
    """What the tasks' prompts in a block add to the output of its attention module, all with the same activation.

    Args:
        stack: The tasks' prompts.
        softmax: Whether the activation is softmax; else it is ReLU.
    """

    def __init__(self, stack: Stack, *, softmax: bool) -> None:
        self._prompts, self._first, self._second = map(stack.tensor, ("prompts", "prompt_A", "prompt_B"))
        self._scale = stack.tensor("prompt_scale")
        gated = stack.of(lambda part: None if part.prompt_gate is None else part)
        self._gate = None if gated is None else gated.tensor("prompt_gate", neutral=1.0)
        self._softmax = softmax
        self._present = stack.present("prompts") if softmax else None
        # Several tasks that are trained at once drop nothing: each would drop scores of its own.
        self._dropout = nn.Identity() if stack.alone is None else stack.alone.dropout

    def __call__(self, states: Tensor, attended: Tensor) -> Tensor:
        """O' (rows, tokens, width) for X, `states`, and O, `attended`, of the same shape."""
        prompts = self._prompts()  # (1 or rows, 1 or tokens, n, width)
        keys = prompts + prompts @ self._first() @ self._second()
        scores = per_task(states, keys.mT.to(states.dtype))  # (rows, tokens, n)
        if self._present is not None:
            present = fit_rows(self._present(), states.shape[0])
            scores = scores.masked_fill(~present, torch.finfo(scores.dtype).min)
        scores = self._dropout(scores.softmax(dim=-1) if self._softmax else scores.relu())
        term = scores.detach().amax(dim=-1, keepdim=True) * per_task(scores, prompts)
        if self._gate is not None:
            term = self._gate.like(term) * term
        return self._scale.like(attended).exp() * (attended + term.to(attended.dtype))


def _change_output(terms: _Terms, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """A forward hook of an attention module, when its first argument is given."""
    states = args[0] if args else kwargs["hidden_states"]
    attended, *rest = output if isinstance(output, tuple) else (output,)
    changed = terms(states, attended)
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

    @classmethod
    def attach(cls, stream: Stream, adapters: Sequence[Any]) -> None:
        """Let each block's attention module give out what the prompts make of its output."""
        for activation in ACTIVATIONS:
            same = [each if each and each.config.activation == activation else None for each in adapters]
            for block, stack in stream.stacks(same):
                hook = partial(_change_output, _Terms(stack, softmax=activation == "softmax"))
                block["attention"].register_forward_hook(hook, with_kwargs=True)
