"""Arithmetic on LoRA adapters: several merged into one, by peft's `LoraModel.add_weighted_adapter`.

The names of the ways to merge are peft's. For adapters with updates s_i B_i A_i and weights w_i:

    cat         sum_i w_i s_i B_i A_i, exactly: A and B side by side, so the rank is the sum of all ranks
    svd         the best approximation of that sum by a smaller rank
    linear      A and B summed apart, each weighted by sqrt(w_i s_i): cheap, but with the products of one's B and
                another's A too (an adapter merged with itself by halves comes out twice as strong)
    ties        "TIES-Merging" (https://arxiv.org/abs/2306.01708): small values dropped, signs elected
    dare_*      "Language Models are Super Mario" (https://arxiv.org/abs/2311.03099): values dropped at random, the
                others scaled up
    magnitude_prune     small values dropped

Those that end with `_svd` do the same to the products B_i A_i in place of A and B, and approximate the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..backbones import Backbone
from ..errors import ConfigError, MemtuneError
from ..methods import LoraConfig
from ..storage import find_folder, load_recorded_backbone, read_folder
from ..tasks import Task
from .multitask import TaskSource, TaskSources
from .tuned import TunedModel

WAYS = (
    *("svd", "linear", "cat", "ties", "ties_svd", "dare_ties", "dare_linear", "dare_ties_svd", "dare_linear_svd"),
    *("magnitude_prune", "magnitude_prune_svd"),
)
"""What peft calls `combination_type`."""

Head: TypeAlias = int | str
"""Which head a merged adapter gets: the number of an adapter, "mean", or "concat"."""


def merge_adapters(
    adapters: Sequence[TaskSource],
    weights: Sequence[float] | None = None,
    *,
    head: Head,
    how: str = "svd",
    density: float | None = None,
    svd_rank: int | None = None,
    majority_sign_method: str = "total",
    seed: int = 0,
    backbone: PreTrainedModel | None = None,
) -> TunedModel:
    """Merge LoRA adapters of one backbone into one new adapter; they stay as they are.

    In masked mode the class token becomes t + sum_i w_i (t_i - t), t being the backbone's, or where it has none the
    mean of the tasks' own.

    Example:
        >>> from memtune.arithmetic import merge_adapters
        >>> merged = merge_adapters(["pets-lora", "birds-lora"], head="concat", how="cat")
        >>> merged.task.labels
        ['cat', 'dog', 'wren', 'robin']

    Args:
        adapters: Folders, ids on the Hub, or tuned models, each with LoRA as its only method, all in the same mode and
            with the same roles and blocks.
        weights: Those of the adapters, negative ones to take away what an adapter does. By default equal ones: 1 where
            `how` has "ties", which takes a mean itself, otherwise such that their sum is 1.
        head: The number of the adapter whose head and labels are taken, 0 for the first; "mean" for the weighted mean
            of heads with the same labels; or "concat" for the classes of all side by side, which were not trained to
            be told from each other.
        how: One of `WAYS`. All but "cat" and those with "svd" need adapters of the same rank.
        density: Share of the values that "ties", "dare" and "magnitude_prune" keep, above 0 and up to 1.
        svd_rank: The new rank, where `how` has "svd"; by default the largest of the adapters'.
        majority_sign_method: How "ties" elects signs: "total" by the sum of values, "frequency" by their number.
        seed: What "dare" draws by.
        backbone: The backbone of the adapters; by default that of the first tuned model among them or, where there is
            none, the one that the first folder recorded.

    Returns:
        The model in evaluation mode, with the first image processor that the adapters have.

    Raises:
        ConfigError: A setting is wrong, or the adapters do not go together. Nothing has been made.
        BackboneMismatchError: An adapter was trained on another backbone.
        CheckpointError: An adapter folder is damaged.
    """
    given = list(adapters) if isinstance(adapters, Sequence) and not isinstance(adapters, str) else []
    if not given:
        raise ConfigError(f"adapters: got {adapters!r}, expected a sequence of folders, ids or tuned models")
    _check_way(how, density, svd_rank, majority_sign_method, len(given))
    factors = _check_weights(weights, len(given), how)
    model = _find_backbone(given) if backbone is None else backbone
    described = Backbone(model)
    tasks, processors = _read(given, described)
    config = _check_same(tasks, described, how)
    if len(kinds := {each.problem_type for each in tasks}) > 1:
        raise ConfigError(f"adapters: got the problem types {sorted(kinds)}, expected one")
    labels, head_weight, head_bias = _merge_heads(tasks, factors, head)
    options = {"density": density, "svd_rank": svd_rank, "majority_sign_method": majority_sign_method}
    tensors, rank = _merge_updates(tasks, factors, how, seed, options)
    tensors |= {"head.weight": head_weight, "head.bias": head_bias}
    if tasks[0].masked:
        tensors["class_token"] = _merge_tokens(tasks, factors, described)
    settings = LoraConfig(rank, rank, config.roles, config.lora_dropout, blocks=config.blocks)  # scaled by 1
    task = Task([settings], labels, described, tasks[0].masked, problem_type=tasks[0].problem_type)
    task.load_tensors(tensors)
    processor = next((each for each in processors if each is not None), None)
    return TunedModel(model, task, processor=processor).eval()


def _check_way(how: Any, density: Any, svd_rank: Any, majority: Any, number: int) -> None:
    if how not in WAYS:
        raise ConfigError(f"how: got {how!r}, expected one of {WAYS}")
    if number == 1 and how != "linear":
        raise ConfigError(f"how: got {how!r} for a single adapter, which can only be scaled: how='linear'")
    prunes = how.startswith(("ties", "dare", "magnitude"))
    if prunes and (not _is_number(density) or not 0 < density <= 1):
        raise ConfigError(f"density: got {density!r}; {how!r} needs the share of values to keep, above 0 and up to 1")
    if not prunes and density is not None:
        raise ConfigError(f"density: got {density!r}, but {how!r} drops no values; leave it out")
    if svd_rank is not None and not how.endswith("svd"):
        raise ConfigError(f"svd_rank: got {svd_rank!r}, but {how!r} makes no decomposition; leave it out")
    if svd_rank is not None and (type(svd_rank) is not int or svd_rank < 1):
        raise ConfigError(f"svd_rank: got {svd_rank!r}, expected a rank, a whole number from 1 on")
    if majority not in ("total", "frequency"):
        raise ConfigError(f"majority_sign_method: got {majority!r}, expected 'total' or 'frequency'")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_weights(weights: Any, number: int, how: str) -> list[float]:
    if weights is None:
        return [1.0 if "ties" in how else 1 / number] * number
    given = list(weights) if isinstance(weights, Sequence) and not isinstance(weights, str) else []
    if len(given) != number or not all(_is_number(weight) for weight in given):
        raise ConfigError(f"weights: got {weights!r}, expected {number} finite numbers, one for each adapter")
    return [float(weight) for weight in given]


def _find_backbone(adapters: Sequence[Any]) -> PreTrainedModel:
    tuned = next((each for each in adapters if isinstance(each, TunedModel)), None)
    if tuned is not None:
        return tuned.backbone
    if not isinstance(adapters[0], (str, Path)):
        raise ConfigError(f"adapters: got {type(adapters[0]).__name__}, expected folders, ids or tuned models")
    return load_recorded_backbone(read_folder(find_folder(adapters[0])))


def _read(adapters: Sequence[Any], backbone: Backbone) -> tuple[list[Task], list[Any]]:
    """The tasks, and the image processor of each or None."""
    read = []
    sources = TaskSources(backbone, any_weights=False)
    for number, source in enumerate(adapters):
        try:
            read.append(sources.read(source, {}))
        except MemtuneError as error:
            raise type(error)(f"adapter {number}: {error}") from error
    return [task for task, _ in read], [processor for _, processor in read]


def _check_same(tasks: Sequence[Task], backbone: Backbone, how: str) -> LoraConfig:
    """The settings of the first adapter, when all go together."""
    configs = []
    for number, task in enumerate(tasks):
        (config, *others) = task.configs
        if others or not isinstance(config, LoraConfig) or config.use_dora or task.extends:
            dora = any(getattr(each, "use_dora", False) for each in task.configs)
            what = f"the methods {task.methods}{' with DoRA' * dora}{' that extend other tasks' * bool(task.extends)}"
            raise ConfigError(f"adapter {number}: got {what}; only adapters of LoRA alone, without DoRA, can be merged")
        configs.append(config)
    facts = {
        "masked": [task.masked for task in tasks],
        "roles": [list(config.roles or ()) for config in configs],
        "blocks": [[block.index for block in config.select(backbone)] for config in configs],
    }
    if how in ("linear", "ties", "dare_ties", "dare_linear", "magnitude_prune"):
        facts["r"] = [config.r for config in configs]
    for name, values in facts.items():
        if any(value != values[0] for value in values):
            other = "; adapters of several ranks can be merged by 'svd' and 'cat'" if name == "r" else ""
            raise ConfigError(f"{name}: got adapters with {values}, expected the same for all{other}")
    return configs[0]


def _merge_heads(tasks: Sequence[Task], weights: Sequence[float], head: Any) -> tuple[list[str], Tensor, Tensor]:
    """The labels, and weight and bias of their head."""
    parts = [(task.labels, task.require_head("head", linear=True)) for task in tasks]
    heads = [(labels, part.weight.detach().cpu(), part.bias.detach().cpu()) for labels, part in parts]
    if type(head) is int and 0 <= head < len(tasks):
        return heads[head]
    if head == "concat":
        labels = [label for task in tasks for label in task.labels]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise ConfigError(f"head='concat': more than one adapter has the labels {twice}; rename them")
        return labels, torch.cat([weight for _, weight, _ in heads]), torch.cat([bias for *_, bias in heads])
    if head != "mean":
        raise ConfigError(f"head: got {head!r}, expected an adapter's number below {len(tasks)}, 'mean' or 'concat'")
    labels, total = heads[0][0], sum(weights)
    if other := [task.labels for task in tasks if sorted(task.labels) != sorted(labels)]:
        raise ConfigError(f"head='mean': got the labels {labels} and {other[0]}, expected the same for all adapters")
    if total <= 0:
        raise ConfigError(f"head='mean': the weights {list(weights)} have no mean, as their sum is not above 0")
    rows = [[names.index(label) for label in labels] for names, *_ in heads]
    parts = zip(weights, heads, rows, strict=True)
    mean = [
        (weight[order] * factor / total, bias[order] * factor / total) for factor, (_, weight, bias), order in parts
    ]
    return labels, torch.stack([weight for weight, _ in mean]).sum(dim=0), torch.stack([b for _, b in mean]).sum(dim=0)


def _merge_tokens(tasks: Sequence[Task], weights: Sequence[float], backbone: Backbone) -> Tensor:
    tokens = torch.stack([task.token().detach().cpu() for task in tasks])  # (adapters, 1, 1, width)
    own = backbone.class_token
    origin = tokens.mean(dim=0) if own is None else own.detach().cpu().float().view(1, 1, -1)
    factors = torch.tensor(weights).view(-1, 1, 1, 1)
    shape = None if tasks[0].class_token is None else tasks[0].class_token.shape
    merged = origin + (factors * (tokens - origin)).sum(dim=0)
    return merged if shape is None else merged.view(shape)


def _merge_updates(
    tasks: Sequence[Task], weights: Sequence[float], how: str, seed: int, options: dict[str, Any]
) -> tuple[dict[str, Tensor], int]:
    """The new adapter's tensors, and its rank."""
    sources = [{key: tensor.cpu() for key, tensor in task.adapters[0].state_dict().items()} for task in tasks]
    places = [key.removesuffix(".lora_A") for key in sources[0] if key.endswith(".lora_A")]
    names = [str(number) for number in range(len(tasks))]
    with torch.random.fork_rng(devices=[]):
        model = _peft_model(tasks, sources[0], places)
        layers: dict[str, Any] = {place: model.model.get_submodule(_name(place)) for place in places}
        for place, layer in layers.items():
            for name, source in zip(names, sources, strict=True):
                layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = (
                    source[f"{place}.{part}"].clone() for part in ("lora_A", "lora_B")
                )
        torch.manual_seed(seed)
        # The smaller decomposition has the same leading vectors, and only these are used.
        model.add_weighted_adapter(
            names, list(weights), "merged", combination_type=how, svd_full_matrices=False, **options
        )
    merged = {}
    for place, layer in layers.items():
        merged[f"{place}.lora_A"] = layer.lora_A["merged"].weight.detach()
        merged[f"{place}.lora_B"] = layer.lora_B["merged"].weight.detach()
    return merged, model.peft_config["merged"].r


def _name(place: str) -> str:
    return place.replace(".", "_")


def _peft_model(tasks: Sequence[Task], shapes: dict[str, Tensor], places: Sequence[str]) -> Any:
    """A model of peft that has all adapters, around linear layers whose weights take no memory and are never read."""
    base = nn.Module()
    for place in places:
        sizes = shapes[f"{place}.lora_A"].shape[1], shapes[f"{place}.lora_B"].shape[0]
        with torch.device("meta"):
            layer = nn.Linear(*sizes, bias=False)
        layer.weight = nn.Parameter(torch.zeros(()).expand(sizes[1], sizes[0]), requires_grad=False)
        base.add_module(_name(place), layer)
    model = None
    for number, task in enumerate(tasks):
        config = task.configs[0]
        assert isinstance(config, LoraConfig)
        # rsLoRA's scale as a plain one: peft gives a merged adapter the kind of scale that the first has, and rank as
        # alpha, which is 1 for plain ones only.
        scale = config.lora_alpha / (math.sqrt(config.rank) if config.use_rslora else config.rank)
        plain = LoraConfig(config.rank, scale * config.rank, init_lora_weights=True).to_peft(
            target_modules=[_name(place) for place in places]
        )
        if model is None:
            model = LoraModel(base, plain, str(number))
        else:
            model.peft_config[str(number)] = plain
            model.inject_adapter(base, str(number))
    return model
