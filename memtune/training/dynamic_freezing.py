"""SlimFit: at each step only the parameters that still change much are trained.

"SlimFit: Memory-Efficient Fine-Tuning of Transformer-based Models Using Training Dynamics" (Ardakani et al., NAACL
2024, https://arxiv.org/abs/2305.18513), as its authors released it (https://github.com/arashardakani/SlimFit).

Each of the t units W_i, the trained parameters of more than one dimension, has a score d_i. In each step the
floor(F t) units with the lowest scores are frozen, F the freezing rate, and after it those that were trained get

    d_i = mean_j |W_i,j^old - W_i,j^new| / (|W_i,j^old| + eps)

while the frozen ones keep their last score. It starts as d_i ~ U(0, 1) 10^7, far above any real score, so that each
unit is trained once before scores decide. Parameters of one dimension (biases) are trained in every step. Ours are eps,
as LoRA's B starts at zero, and that a step which changed no unit (its learning rate was 0, or a gradient scaler skipped
it) leaves all scores as they are.

Where adapters on a frozen backbone differ: the units are the adapters' matrices, the class token and the head's
weight; the backbone's layers, whose inputs the paper saves, need none kept in the first place, and its rule for the
weights of the blocks' norms has no object. What a frozen unit saves is the input that its own gradient would need (of
LoRA's A, if no other A reads the same), and everything in the blocks before the first unit that is trained. The
paper's compression of the activations that remain is not done here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from .callbacks import TrainingCallback

FIRST_SCORE = 1e7
EPS = 1e-6
"""Keeps the score of a unit that was zero below any first score."""


class SlimFit(TrainingCallback):
    """Freezes, for one step at a time, the units of a model that its last steps changed least.

    A callback of `memtune.fit`. In a loop of your own, with an optimizer made of all trained parameters:

        slimfit.on_step_begin(model)  # before the forward pass of a step's first batch
        ...  # forward and backward; optimizer.step(); optimizer.zero_grad(), which must set gradients to None
        slimfit.on_step_end(model)

    Args:
        freezing_rate: Share of the units that each step freezes, F, from 0 to below 1 (the paper: 0.75 to 0.95).
        seed: Of the first scores.

    Attributes:
        scores: The score of each unit, by the parameter's name.

    Raises:
        ConfigError: A setting is wrong.
    """

    def __init__(self, freezing_rate: float = 0.75, *, seed: int = 0) -> None:
        given = isinstance(freezing_rate, (int, float)) and not isinstance(freezing_rate, bool)
        if not given or not 0 <= freezing_rate < 1:
            raise ConfigError(f"freezing_rate: got {freezing_rate!r}, expected a number from 0 to below 1")
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise ConfigError(f"seed: got {seed!r}, expected a whole number, 0 or more")
        self.freezing_rate = freezing_rate
        self.seed = seed
        self.scores: dict[str, float] = {}
        self._frozen: list[nn.Parameter] = []
        self._trained: dict[str, tuple[nn.Parameter, Tensor]] = {}

    def on_step_begin(self, model: nn.Module) -> None:
        """Freeze the units with the lowest scores until `on_step_end`: they get no gradient, and no step.

        Args:
            model: The model; of several copies that train together (DistributedDataParallel) none can be.

        Raises:
            ConfigError: Several processes train together: the others would wait for the gradients left out.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            processes = torch.distributed.get_world_size()
            if processes > 1:
                raise ConfigError(f"SlimFit: got {processes} processes that train together, expected one; leave it out")
        self._release()  # what a step that was broken off left frozen
        units = {name: parameter for name, parameter in model.named_parameters() if _is_unit(parameter)}
        unseen = [name for name in units if name not in self.scores]
        first = np.random.default_rng([self.seed, len(self.scores)]).random(len(unseen)) * FIRST_SCORE
        self.scores |= dict(zip(unseen, first.tolist(), strict=True))
        ascending = sorted(units, key=self.scores.__getitem__)
        number = math.floor(self.freezing_rate * len(units) + 1e-9)  # 0.29 * 100 is a little less than 29
        for name in ascending[:number]:
            parameter = units[name]
            parameter.requires_grad_(False)
            parameter.grad = None  # an optimizer passes by what has none; of zeros it would still apply the momentum
            self._frozen.append(parameter)
        self._trained = {name: (units[name], units[name].detach().clone()) for name in ascending[number:]}

    def on_step_end(self, model: nn.Module) -> None:
        """Score what was trained, and make all units trainable again."""
        if self._trained:
            changes = [_relative_change(old, parameter) for parameter, old in self._trained.values()]
            scores = torch.stack(changes).tolist()
            if any(scores):
                self.scores |= dict(zip(self._trained, scores, strict=True))
        self._release()

    def on_train_end(self, model: nn.Module) -> None:
        """Make all units trainable again, where a step was broken off."""
        self._release()

    def _release(self) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen, self._trained = [], {}

    def state_dict(self) -> dict[str, Any]:
        """The scores, as JSON values; between steps."""
        return {"scores": dict(self.scores)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            CheckpointError: It is not such a state; nothing has been changed.
        """
        scores = state.get("scores")
        if not isinstance(scores, Mapping) or not all(isinstance(score, (int, float)) for score in scores.values()):
            raise CheckpointError(f"SlimFit: got a state with {sorted(state)}, expected `scores`, a number by name")
        self.scores = {name: float(score) for name, score in scores.items()}


def _is_unit(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and parameter.dim() > 1


@torch.no_grad()
def _relative_change(old: Tensor, new: Tensor) -> Tensor:
    """d_i of a unit, as float32."""
    return ((old - new).abs() / (old.abs() + EPS)).float().mean()
