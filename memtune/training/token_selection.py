"""TokenTune: gradients through a random part of the tokens only.

"Memory-Efficient Fine-Tuning of Transformers via Token Selection" (Simoulin et al., EMNLP 2024,
https://arxiv.org/abs/2501.18824), as its authors released it (https://github.com/facebookresearch/tokentune).

For each image and pass a set G of k positions is drawn: the class token's, and k - 1 of the others, uniformly without
replacement (k of all where the backbone has no class token). In each block, with sg() for "no gradient":

    H' = block(H),    of the tokens outside G: sg(H'),    of those in G by queries Q_G over [sg(K_rest); K_G] and
                                                          [sg(V_rest); V_G], then their own part of the block

So values are those of the ordinary pass, and what is kept for the backward pass is that of k tokens, and the keys and
values of all. Here the first line runs over all tokens without gradients, the second again over those in G: a forward
pass of 1 + k / T times the work for T tokens, for which the values stay those of the ordinary pass bit for bit.

Where adapters on a frozen backbone differ: a frozen linear layer keeps no input, so the ordinary pass keeps less to
begin with, and the keys and values are more of it. The paper's classifier reads the mean of the tokens in G; here the
head reads the feature that it always reads, the class token's or a mean through which only those in G have a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..backbones import Backbone
from ..errors import CheckpointError, ConfigError, UnsupportedBackboneError
from ..models import TunedModel
from ..streams import AdaptedStream, Pass
from .callbacks import TrainingCallback


class TokenTune(TrainingCallback):
    """Lets the steps of an unmasked model pass gradients through some tokens of each image only.

    A callback of `memtune.fit`. In a loop of your own:

        token_tune.on_step_begin(model)  # before the forward pass of a step's first batch
        ...  # forward and backward; optimizer.step(); optimizer.zero_grad()
        token_tune.on_step_end(model)

    Passes outside of steps, and those without gradients, are ordinary ones.

    Args:
        tokens: How many tokens of each image, k, the class token among them (all if it has fewer); or, as a float, the
            share of its tokens.
        seed: Of the draws; those of pass n depend on it and on n alone.

    Raises:
        ConfigError: A setting is wrong.
    """

    def __init__(self, tokens: int | float = 16, *, seed: int = 0) -> None:
        number = isinstance(tokens, (int, float)) and not isinstance(tokens, bool)
        if not number or not (tokens >= 1 if isinstance(tokens, int) else 0 < tokens <= 1):
            raise ConfigError(
                f"tokens: got {tokens!r}, expected a whole number from 1 on, or a share above 0 up to 1.0"
            )
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise ConfigError(f"seed: got {seed!r}, expected a whole number, 0 or more")
        self.tokens = tokens
        self.seed = seed
        self._passes = 0
        self._view: Backbone | None = None

    def on_step_begin(self, model: TunedModel) -> None:
        """Select tokens in every pass of the model that records gradients, until `on_step_end`.

        Raises:
            ConfigError: The model is masked: its trunk has no gradient, and one token of each image has one anyway.
            UnsupportedBackboneError: The backbone has no queries that all tokens' keys can be given to.
        """
        stream = model.stream
        if not isinstance(stream, AdaptedStream):
            raise ConfigError("TokenTune: got a masked model, expected masked=False: the trunk keeps no activations")
        view = stream.view
        if not stream.sites or view.family.staged:
            raise UnsupportedBackboneError(
                f"TokenTune: got {type(view.model).__name__}, expected a backbone with attention over all tokens by "
                "transformers' AttentionInterface; train it without TokenTune"
            )
        if self._view is view:
            return
        self.on_step_end(model)
        exact = not any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.task.modules())
        for block in view.blocks:
            block.module.forward = partial(self._run, block.module.forward, view, exact)
        self._view = view

    def on_step_end(self, model: TunedModel) -> None:
        """Let all passes be ordinary ones again."""
        view, self._view = self._view, None
        for block in view.blocks if view else ():
            del block.module.forward  # the instance's; its class has the ordinary one

    def on_train_end(self, model: TunedModel) -> None:
        """Let all passes be ordinary ones again, where a step was broken off."""
        self.on_step_end(model)

    def positions(self, batch: int, tokens: int, has_class_token: bool = True) -> Tensor:
        """The next draw: positions (batch, k) in ascending order, the first of them 0 where there is a class token."""
        number = self.tokens if isinstance(self.tokens, int) else max(1, round(self.tokens * tokens))
        number = min(number, tokens)
        draws = np.random.default_rng([self.seed, self._passes]).random((batch, tokens))
        self._passes += 1
        if has_class_token:
            draws[:, 0] = -1.0
        return torch.from_numpy(np.sort(np.argsort(draws, axis=1)[:, :number], axis=1))

    def _run(
        self, forward: Callable[..., Any], view: Backbone, exact: bool, states: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """A block's forward, of states (batch, tokens, width)."""
        current: Pass = kwargs.pop("memtune_pass")
        if not torch.is_grad_enabled():
            return forward(states, *args, **kwargs, memtune_pass=current)
        batch, tokens, _ = states.shape
        if current.selected is None:
            current.selected = self.positions(batch, tokens, view.class_token is not None).to(states.device)
        positions = current.selected
        if positions.shape[1] == tokens:
            return forward(states, *args, **kwargs, memtune_pass=current)
        every = _Tokens()
        with _no_gradient(states.device.type):
            output = forward(states, *args, **kwargs, memtune_pass=current.with_keys_values(every.keep))
        own = partial(every.read, positions, exact)
        kwargs = view.family.selected_arguments(view.tower, positions, kwargs)
        rows = torch.arange(batch, device=states.device)[:, None]
        selected = forward(states[rows, positions], *args, **kwargs, memtune_pass=current.with_keys_values(own))
        if not isinstance(output, tuple):
            return pass_gradient(output, selected, positions, 1, exact)
        return (pass_gradient(output[0], selected[0], positions, 1, exact), *output[1:])

    def state_dict(self) -> dict[str, Any]:
        """What the next draw depends on, as JSON values."""
        return {"seed": self.seed, "passes": self._passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            CheckpointError: It is not such a state; nothing has been changed.
        """
        seed, passes = state.get("seed"), state.get("passes")
        if not isinstance(seed, int) or not isinstance(passes, int):
            raise CheckpointError(
                f"TokenTune: got a state with {sorted(state)}, expected whole numbers seed and passes"
            )
        self.seed, self._passes = seed, passes


class _Tokens:
    """Keys, values and mask of all tokens in one block: kept by the pass of all, read by that of the selected ones."""

    def keep(self, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        self._key, self._value, self._mask = key, value, mask
        return key, value, mask

    def read(
        self, positions: Tensor, exact: bool, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the queries of selected tokens see, in place of their own keys and values (batch, heads, k, width)."""
        key = pass_gradient(self._key, key, positions, 2, exact)
        value = pass_gradient(self._value, value, positions, 2, exact)
        mask = self._mask  # (1 or batch, 1 or heads, tokens, tokens); the block made that of k tokens without positions
        if mask is not None:
            index = positions[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
            mask = mask.expand(len(positions), -1, -1, -1).gather(2, index)
        return key, value, mask


@contextmanager
def _no_gradient(device: str) -> Iterator[None]:
    """No gradients; nor does autocast keep its casts of parameters, which older torch would give to a pass that has."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    with torch.no_grad(), torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False):
        yield


def pass_gradient(every: Tensor, own: Tensor, positions: Tensor, dim: int, exact: bool = True) -> Tensor:
    """All tokens' values, with the gradient of the selected ones going to their own pass.

    Args:
        every: Of all tokens, without gradient, (batch, ..., tokens, ...).
        own: Of the selected ones, (batch, ..., k, ...).
        positions: Where these are among all, (batch, k).
        dim: Which dimension counts tokens.
        exact: Take the values of the selected ones from `every` too, whose only difference is rounding; False where
            each pass drops values of its own: the gradient must then be that of the values given on.
    """
    return _PassGradient.apply(every, own, positions, dim, exact)  # type: ignore[return-value]


class _PassGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, every: Tensor, own: Tensor, positions: Tensor, dim: int, exact: bool) -> Tensor:
        shape = [1] * own.ndim
        shape[0], shape[dim] = positions.shape
        ctx.dim, ctx.shape = dim, own.shape
        ctx.save_for_backward(positions.view(shape))
        return every.view_as(every) if exact else every.scatter(dim, positions.view(shape).expand(own.shape), own)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None, None, None]:
        (gradient,), (index,) = gradients, ctx.saved_tensors
        return None, gradient.gather(ctx.dim, index.expand(ctx.shape)), None, None, None
