"""What FSDP2 and DeepSpeed, as Accelerate starts them, need of a run.

FSDP2 keeps the frozen backbone in shards, a part on each device. It hooks a block to gather its parameters before it
runs, and puts them where the shards were: into the parameter dictionaries of its modules. Views have the hooks of the
modules that they are made of, and share these dictionaries (`memtune.views`), so a block of a view is gathered as one
of the backbone is. What is trained is small, and stays whole on each device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.utils import parameters_to_vector

from .backbones import Backbone
from .errors import ConfigError
from .training_config import TrainingConfig
from .tuned import TunedModel


def settle(accelerator: Accelerator, config: TrainingConfig) -> None:
    """Check how parameters are to be sharded, and give DeepSpeed, which has settings of its own, those of the run.

    Raises:
        ConfigError: Parameters are to be sharded in a way that views cannot follow, or cast.
    """
    state: Any = accelerator.state
    if accelerator.distributed_type == DistributedType.FSDP:
        _check_fsdp(state.fsdp_plugin)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _check_deepspeed(state.deepspeed_plugin, config)
        state.deepspeed_plugin.deepspeed_config["gradient_clipping"] = config.max_grad_norm
        state.deepspeed_plugin.deepspeed_config["gradient_accumulation_steps"] = config.gradient_accumulation_steps


def _check_fsdp(plugin: Any) -> None:
    if plugin.fsdp_version != 2:
        raise ConfigError(
            f"got fsdp_version {plugin.fsdp_version}, which flattens the parameters that memtune's views share; set "
            "fsdp_version: 2 (examples/configs/fsdp.yaml)"
        )
    if plugin.cpu_ram_efficient_loading:
        raise ConfigError(
            "got fsdp_cpu_ram_efficient_loading: true, under which all processes but the first have an empty backbone "
            "that memtune cannot copy; set it to false"
        )
    if plugin.activation_checkpointing:
        raise ConfigError(
            "got fsdp_activation_checkpointing: true, which puts other modules around the blocks; set it to false, and "
            "call `model.activation_checkpointing_enable()` before `fit`"
        )


def _check_deepspeed(plugin: Any, config: TrainingConfig) -> None:
    if plugin.zero_stage == 3:
        raise ConfigError(
            "got DeepSpeed ZeRO stage 3, which keeps its counts in the modules that it knows, and memtune runs views "
            "of them; use stage 2 (examples/configs/deepspeed_zero2.yaml), or FSDP2 to shard the backbone "
            "(examples/configs/fsdp.yaml)"
        )
    if config.mixed_precision != "no":
        raise ConfigError(
            f"mixed_precision: got {config.mixed_precision!r} with DeepSpeed, which would cast the backbone and the "
            "adapter themselves; use 'no', with a backbone that was loaded in the precision that it is to run in"
        )


def is_sharding(accelerator: Accelerator) -> bool:
    """Whether the backbone is to be sharded."""
    return accelerator.distributed_type == DistributedType.FSDP


def prepare_to_evaluate(accelerator: Accelerator, model: TunedModel, loader: Any) -> tuple[Any, Any]:
    """What Accelerate makes of a model and a loader of batches where there is no optimizer."""
    if accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return accelerator.prepare(model, loader)
    # These prepare no model without an optimizer, so each device has the whole one.
    model.to(accelerator.device)
    model.forward = accelerator.autocast()(model.forward)
    return model, accelerator.prepare_data_loader(loader)


@contextmanager
def sharded(accelerator: Accelerator, model: TunedModel) -> Iterator[TunedModel]:
    """Within, what to prepare in place of a model: where nothing is to be sharded, the model itself.

    Else one around a copy of the backbone's modules, which shares the backbone's memory until Accelerate puts shards in
    its place, and the very task of `model`. So the model that was given stays whole, where it is: afterwards it has the
    trained values, and the shards go.
    """
    if not is_sharding(accelerator):
        yield model
        return
    backbone = model.backbone
    shared: dict[int, Any] = {id(model.task): model.task, id(model.processor): model.processor}
    shared |= {id(parameter): nn.Parameter(parameter.detach(), False) for parameter in backbone.parameters()}
    shared |= {id(buffer): buffer.detach() for buffer in backbone.buffers()}
    twin = copy.deepcopy(model, shared)
    twin.task.to(accelerator.device)
    _take_from_first(twin.task.state_dict(keep_vars=True).values())
    _set_up(accelerator.state.fsdp_plugin, twin)
    twin.forward = accelerator.autocast()(twin.forward)
    try:
        yield twin
    finally:
        model.task.to(backbone.device)
        model.eval()


@torch.no_grad()
def _take_from_first(values: Iterable[Tensor]) -> None:
    """Give each process the values that the first one starts with."""
    for value in values:
        received: Any = broadcast(value.detach().clone())
        value.copy_(received)


def _set_up(plugin: Any, model: TunedModel) -> None:
    """Let FSDP shard each block by itself, leave what is trained alone, and leave the precision to autocast.

    By a precision of its own FSDP would cast what enters a block, and for that copy what travels with a pass: what the
    block then wrote there would be lost.
    """
    plugin.ignored_modules = [model.task]
    plugin.mixed_precision_policy = None
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    blocks = Backbone(model.backbone).blocks
    plugin.transformer_cls_names_to_wrap = sorted({type(block.module).__name__ for block in blocks})


def average_gradients(accelerator: Accelerator, trained: Iterable[nn.Parameter]) -> None:
    """Replace the gradients of parameters that FSDP leaves alone by their mean over all processes."""
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    if not gradients:
        return
    mean: Any = accelerator.reduce(parameters_to_vector(gradients), "mean")
    for gradient, part in zip(gradients, mean.split([each.numel() for each in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
