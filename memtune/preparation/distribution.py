"""What FSDP2 and DeepSpeed, as Accelerate starts them, need of a run.

FSDP2 and stage 3 of DeepSpeed's ZeRO keep the frozen backbone in shards, a part on each device. They hook a block to
gather its parameters before it runs: FSDP2 puts them where the shards were, into the parameter dictionaries of its
modules, DeepSpeed into the parameters. Views have the hooks of the modules that they are made of, and share these
dictionaries (`backbones/views.py`), so a block of a view is gathered as one of the backbone is. What is trained is
small: with FSDP2 it stays whole on each device, DeepSpeed has it in shards too, but for the passes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn import functional
from torch.nn.utils import parameters_to_vector
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..backbones import Backbone
from ..errors import ConfigError
from ..models import TunedModel
from .config import TrainingConfig


def settle(accelerator: Accelerator, config: TrainingConfig) -> None:
    """Check how parameters are to be sharded, and give DeepSpeed, which has settings of its own, those of the run.

    Raises:
        ConfigError: Parameters are to be sharded in a way that views cannot follow, or cast.
    """
    state: Any = accelerator.state
    if accelerator.distributed_type == DistributedType.FSDP:
        _check_fsdp(state.fsdp_plugin)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _check_deepspeed(config)
        state.deepspeed_plugin.deepspeed_config["gradient_clipping"] = config.max_grad_norm
        state.deepspeed_plugin.deepspeed_config["gradient_accumulation_steps"] = config.gradient_accumulation_steps
        unset_hf_deepspeed_config()  # by which transformers would load all further models in shards (stage 3)


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


def _check_deepspeed(config: TrainingConfig) -> None:
    if config.mixed_precision != "no":
        raise ConfigError(
            f"mixed_precision: got {config.mixed_precision!r} with DeepSpeed, which would cast the backbone and the "
            "adapter themselves; use 'no', with a backbone that was loaded in the precision that it is to run in"
        )


def is_sharding(accelerator: Accelerator) -> bool:
    """Whether FSDP is to shard the backbone."""
    return accelerator.distributed_type == DistributedType.FSDP


def _has_stage_3(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed is to shard all parameters."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return False
    plugin: Any = accelerator.state.deepspeed_plugin  # whose own `zero_stage` is not that of a DeepSpeed file
    return plugin.deepspeed_config.get("zero_optimization", {}).get("stage") == 3


@contextmanager
def sharded(accelerator: Accelerator, model: TunedModel) -> Iterator[TunedModel]:
    """Within, what to prepare in place of a model: where nothing is to be sharded, the model itself.

    Else one around a copy of the backbone's modules, which shares the backbone's memory until shards are put in its
    place. So the model that was given stays whole, where it is: afterwards it has the trained values (with DeepSpeed,
    whose task is a copy too, those of a run that was not broken off), and the shards go.

    Raises:
        ConfigError: Something of the model cannot be sharded with DeepSpeed.
    """
    if is_sharding(accelerator):
        yield from _sharded_by_fsdp(accelerator, model)
    elif _has_stage_3(accelerator):
        yield from _sharded_by_deepspeed(accelerator, model)
    else:
        yield model


def _sharded_by_fsdp(accelerator: Accelerator, model: TunedModel) -> Iterator[TunedModel]:
    """Yield a twin that has the very task of the model."""
    twin = _twin(model, {id(model.task): model.task})
    twin.task.to(accelerator.device)
    _take_from_first(twin.task.state_dict(keep_vars=True).values())
    _set_up(accelerator.state.fsdp_plugin, twin)
    twin.forward = accelerator.autocast()(twin.forward)
    try:
        yield twin
    finally:
        model.task.to(model.backbone.device)
        model.eval()


def _sharded_by_deepspeed(accelerator: Accelerator, model: TunedModel) -> Iterator[TunedModel]:
    """Yield a twin whose task is a copy, as DeepSpeed changes parameters and modules for good."""
    _check_stage_3(model)
    twin = _twin(model, {})
    linear = functional.linear
    _prepare_modules(Backbone(twin.backbone))
    try:
        yield twin
        with whole(accelerator, twin.task):
            model.task.load_tensors(twin.task.tensors())
    finally:
        functional.linear = linear  # for which DeepSpeed has put one of its own
        model.eval()


def _check_stage_3(model: TunedModel) -> None:
    if model.task.penalty() is not None:
        raise ConfigError(
            f"got DeepSpeed ZeRO stage 3, and {model.task.methods} with a penalty of trained values, which are in "
            "shards where it is computed; set its weight to 0, or use stage 2 (examples/configs/deepspeed_zero2.yaml) "
            "or FSDP2 (examples/configs/fsdp.yaml)"
        )
    if any(hasattr(parameter, "ds_id") for parameter in model.backbone.parameters()):
        raise ConfigError(
            "got a backbone whose parameters DeepSpeed has in shards already; load it before DeepSpeed is set up, or "
            "with zero3_init_flag: false"
        )


def _twin(model: TunedModel, shared: dict[int, Any]) -> TunedModel:
    """A copy of a model that shares the backbone's memory, and the objects given by their ids."""
    backbone = model.backbone
    shared = shared | {id(model.processor): model.processor}
    shared |= {id(parameter): nn.Parameter(parameter.detach(), False) for parameter in backbone.parameters()}
    shared |= {id(buffer): buffer.detach() for buffer in backbone.buffers()}
    return copy.deepcopy(model, shared)


def _prepare_modules(backbone: Backbone) -> None:
    """Let DeepSpeed gather each block by itself, and count on a module what its views wait for.

    DeepSpeed's hooks begin a count of gradients on the module that runs, which is a view, and go on with it on the one
    that they were placed on. When it is back at 0 the module's parameters are let go.
    """
    blocks = [block.module for block in backbone.blocks]
    classes = sorted({type(block).__name__ for block in blocks})
    import_module("deepspeed.utils").set_z3_leaf_modules(backbone.model, classes)
    within = {id(each) for block in blocks for each in block.modules() if each is not block}
    for module in backbone.model.modules():
        for name in [name for name, each in module.named_parameters(recurse=False) if not each.dim()]:
            number = getattr(module, name).detach()  # a parameter without dimensions, which DeepSpeed cannot send
            delattr(module, name)
            module.register_buffer(name, number)
        if id(module) not in within:
            module.register_forward_pre_hook(partial(_begin_count, module))


def _begin_count(module: Any, view: nn.Module, args: Any) -> None:
    """A hook, called before DeepSpeed's, of a module and its views."""
    module.ds_grads_remaining = 0


def shard(accelerator: Accelerator, twin: TunedModel) -> None:
    """Before `Accelerator.prepare`: put into shards what DeepSpeed would first move to a GPU as a whole.

    Args:
        accelerator: What is to prepare it.
        twin: What `sharded` gave.
    """
    if not _has_stage_3(accelerator):
        return
    zero: Any = import_module("deepspeed").zero
    plugin: Any = accelerator.state.deepspeed_plugin
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": plugin.deepspeed_config["zero_optimization"]}
    zero.Init(module=twin.backbone, config_dict_or_path=settings)
    twin.to(accelerator.device)
    for parameter in twin.task.parameters():
        zero.register_external_parameter(twin, parameter)  # as they run in its views, not in the task's own modules


@contextmanager
def whole(accelerator: Accelerator, task: nn.Module) -> Iterator[None]:
    """Within, the trained values of a task are whole on each process, outside of a pass; what is written there stays.

    All processes must enter together, and write the same.
    """
    if not _has_stage_3(accelerator):
        yield
        return
    with import_module("deepspeed").zero.GatheredParameters(list(task.parameters()), modifier_rank=0):
        yield


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
