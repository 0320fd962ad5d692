"""One pass over all tokens with the paper's attention mask written out: what the streams are compared with."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from backbone_zoo import Case
from torch import Tensor, nn


def dense_mask(base: int, memory: int) -> Tensor:
    """Table 1 of the paper for one task, as an additive mask over [memory; task token; base tokens].

    Base tokens see base tokens; the task token sees base tokens, itself and its memory. Memory has no row in the table:
    what its queries see is dropped, and they see everything here so that no row is empty.
    """
    task, total = memory, memory + 1 + base
    mask = torch.full((total, total), float("-inf"))
    mask[task + 1 :, task + 1 :] = 0
    mask[task, :] = 0
    mask[:memory, :] = 0
    return mask


def dense_forward(
    case: Case, model: nn.Module, memory: list[Tensor], class_token: Tensor, images: Tensor
) -> tuple[Tensor, Tensor]:
    """One pass over [memory; task token; base tokens] in every block: the task's feature, and the base tokens."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    tower = case.tower(model)
    token = class_token.reshape(1, 1, -1) + class_position(tower)
    tower.embeddings.register_forward_hook(partial(_add_task_token, token))
    for block, tokens in zip(case.blocks(model), memory, strict=True):
        number = len(tokens)
        block.register_forward_pre_hook(partial(_add_memory, tokens))
        block.register_forward_hook(partial(_drop_memory, number))
        attention = getattr(block, case.facts.attention)
        attention.register_forward_pre_hook(partial(_mask, number), with_kwargs=True)
    for name, module in tower.named_modules():
        if name.endswith(("relative_position_bias", "shared_position_bias")):
            module.register_forward_hook(partial(_place_bias, len(memory[0])))
    output = case.run_tower(model, images).last_hidden_state
    return case.facts.finish(tower, output[:, 0]), output[:, 1:]


def class_position(tower: Any) -> Any:
    """The position that a class token has in a tower, or would have if it had one: none, then."""
    embeddings = tower.embeddings
    if hasattr(embeddings, "class_embedding"):  # CLIP
        return embeddings.position_embedding.weight[0]
    table = getattr(embeddings, "position_embeddings", None)
    if getattr(embeddings, "cls_token", None) is None or table is None:
        return 0
    return table[:, :1]


def _add_task_token(token: Tensor, module: nn.Module, args: Any, output: Any) -> Any:
    tokens, *rest = output if isinstance(output, tuple) else (output,)
    tokens = torch.cat([token.expand(len(tokens), -1, -1), tokens], dim=1)
    return (tokens, *rest) if rest else tokens


def _add_memory(memory: Tensor, module: nn.Module, args: Any) -> Any:
    tokens, *rest = args
    return (torch.cat([memory.expand(len(tokens), -1, -1), tokens], dim=1), *rest)


def _drop_memory(number: int, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output[:, number:]


def _mask(memory: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Add the dense mask to the position bias, if there is one."""
    tokens, *rest = args or [kwargs["hidden_states"]]
    bias = rest[0] if rest else kwargs.get("attention_mask")
    mask = dense_mask(tokens.shape[1] - memory - 1, memory)
    kwargs = {name: value for name, value in kwargs.items() if name not in ("attention_mask", "hidden_states")}
    return (tokens,), kwargs | {"attention_mask": mask if bias is None else bias + mask}


def _place_bias(memory: int, module: nn.Module, args: Any, bias: Tensor) -> Tensor:
    """BEiT: the task token has the class token's bias to the base tokens and to itself, and none to memory."""
    task, base = memory, bias.shape[-1]
    placed = bias.new_zeros(1, bias.shape[1], task + 1 + base, task + 1 + base)
    placed[..., task + 1 :, task + 1 :] = bias
    placed[..., task, task + 1 :] = bias[..., 0, :]
    placed[..., task, task] = bias[..., 0, 0]
    return placed
