"""What is trained for one task: the adapters of its methods, its class token, its head; and its labels."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..backbones import TOWERS, Backbone
from ..errors import CheckpointError, ConfigError, UnsupportedBackboneError
from ..methods import Adapter, AdapterConfig, create_adapter, find_method
from .checks import misfits
from .heads import HEAD_STD, RandomFeatureHead, RandomFeatures, create_head
from .objectives import OBJECTIVES, Objective, find_objective


class Task(nn.Module):
    """The parameters of one task.

    Attributes:
        adapters: One adapter for each method.
        labels: Names of the classes, or of the numbers that it gives; none if the task has no head.
        problem_type: What its labels are, by transformers' name.
        has_token: Whether a token of the task's own, or the backbone's, reads the images for the head; if not, a method
            makes the feature.
        head: What makes logits of features, or None.
        masked: Whether the task runs in a task stream.
        extends: Earlier tasks, by name, that the task reads.
        backbone_head: Whether the backbone's own head reads the adapted tower.
        image_size: Height and width in pixels that it was trained at, where they are not the backbone's; else None.

    Args:
        configs: One configuration for each method.
        labels: Names of the classes, in the order of the logits; none for a task without a head.
        backbone: The backbone to adapt.
        masked: Whether the task runs in a task stream.
        extends: Earlier tasks, by name, whose tokens and memory the task reads in its stream.
        backbone_head: Whether the backbone's own head reads the adapted tower (unmasked; the task has no labels).
        random_features: What the head reads, made of the feature; None for the feature itself.
        problem_type: What the labels are, by transformers' name; None for one class of an image.

    Raises:
        ConfigError: The methods do not go together, or a setting does not fit the backbone.
        UnsupportedBackboneError: The backbone lacks what the mode or a method asks for.
    """

    def __init__(
        self,
        configs: Sequence[AdapterConfig],
        labels: Sequence[str],
        backbone: Backbone,
        masked: bool,
        extends: Mapping[str, Task] | None = None,
        *,
        backbone_head: bool = False,
        random_features: RandomFeatures | None = None,
        problem_type: str | None = None,
    ) -> None:
        super().__init__()
        if backbone_head:
            _check_backbone_head(backbone, masked)
        _check_backbone(configs, backbone, masked, images_alone=not backbone_head)
        self.backbone_head = backbone_head
        self.image_size: tuple[int, int] | None = None
        self.extends = dict(extends or {})  # no submodules: they are other tasks' to train, save and count
        self.labels = list(labels)
        self.problem_type = find_objective(problem_type).problem_type
        self.masked = masked
        adapters = nn.ModuleList(create_adapter(config.for_mode(masked), backbone) for config in configs)
        self.adapters = cast("Sequence[Adapter]", adapters)
        width = _own_feature(configs, backbone, self.extends)
        self.has_token = width is None
        self.class_token = self._create_class_token(configs, backbone)
        self.head = create_head(width or backbone.width, len(self.labels), random_features) if self.labels else None
        twice = [key for key, count in Counter(self._keys()).items() if count > 1]
        if twice:
            raise ConfigError(
                f"two of the methods {self.methods} own the same parameters, such as {twice[0]}; leave one out"
            )

    def _create_class_token(self, configs: Sequence[AdapterConfig], backbone: Backbone) -> nn.Parameter | None:
        if not self.has_token:
            return None
        own = backbone.class_token
        if own is not None and (self.masked or any(config.trains_class_token() for config in configs)):
            return nn.Parameter(own.detach().clone().float())
        return nn.Parameter(torch.randn(1, 1, backbone.width) * HEAD_STD) if self.masked else None

    @property
    def objective(self) -> Objective:
        """What its labels are, and how answers are measured by them."""
        return OBJECTIVES[self.problem_type]

    @property
    def configs(self) -> list[AdapterConfig]:
        """The settings of each method."""
        return [adapter.config for adapter in self.adapters]

    @property
    def methods(self) -> list[str]:
        """The names of the methods."""
        return [config.method for config in self.configs]

    def _keys(self) -> list[str]:
        return [key for adapter in self.adapters for key in adapter.state_dict()]

    def token(self) -> Tensor:
        """The class token, (1, 1, width).

        Raises:
            RuntimeError: The task has none of its own.
        """
        if self.class_token is None:
            raise RuntimeError("this task uses the backbone's class token")
        # Detached where no gradient is recorded, as a view of a parameter says that it requires one all the same.
        token = self.class_token if torch.is_grad_enabled() else self.class_token.detach()
        return token.view(1, 1, -1)

    def _apply(self, *arguments: Any, **options: Any) -> Task:
        for task in self.extends.values():
            task._apply(*arguments, **options)
        return super()._apply(*arguments, **options)

    def digest(self) -> str:
        """A digest of the trained values, as hexadecimal digits: equal for equal ones."""
        digest = hashlib.sha256()
        for key, tensor in sorted(self.tensors().items()):
            digest.update(f"{key} {tuple(tensor.shape)} ".encode() + tensor.cpu().float().numpy().tobytes())
        return digest.hexdigest()

    def logits(self, features: Tensor) -> Tensor:
        """Logits (batch, classes) of features (batch, width)."""
        head = self.require_head("logits")
        return head(features.to(head.weight.dtype))

    @property
    def random_features(self) -> RandomFeatures | None:
        """What the head reads, made of the feature; None if it reads the feature itself."""
        return self.head.settings if isinstance(self.head, RandomFeatureHead) else None

    def require_head(self, what: str, *, linear: bool = False) -> nn.Linear:
        """The head.

        Args:
            what: What needs it, for the error.
            linear: Whether it must read the feature itself.

        Raises:
            ConfigError: The task has none, or one that reads something else.
        """
        if self.head is None:
            given = "'backbone': it gives the backbone's output" if self.backbone_head else "None: it gives features"
            raise ConfigError(f"{what}: this adapter was wrapped with head={given}, and has no head and no labels")
        if linear and self.random_features is not None:
            raise ConfigError(
                f"{what}: the head reads random features, for which there is no place outside memtune, nor a mean; "
                "wrap with head='linear'"
            )
        return self.head

    def summary(self) -> str:
        """What it is, in a line: methods, mode, labels, the size of its images."""
        trained = zip(self.methods, self.adapters, strict=True)
        methods = " + ".join(name for name, adapter in trained if any(True for _ in adapter.parameters()))
        shown = ", ".join(self.labels[:4]) + (", ..." if len(self.labels) > 4 else "")
        kinds = {"regression": "numbers", "multi_label_classification": "classes, any of them"}
        kind = kinds.get(self.problem_type, "classes")
        what = f"{len(self.labels)} {kind} ({shown})" if self.labels else "features"
        size = f", at {self.image_size[0]} x {self.image_size[1]} px" if self.image_size else ""
        return f"{methods or 'head alone'}, {'masked' if self.masked else 'unmasked'}: {what}{size}"

    def penalty(self) -> Tensor | None:
        """What the methods add to the loss in training, a single number, or None."""
        penalties = [adapter.penalty() for adapter in self.adapters]
        given = [penalty for penalty in penalties if penalty is not None]
        return torch.stack(given).sum() if given else None

    def tensors(self) -> dict[str, Tensor]:
        """Every trained tensor under its role key: `blocks.3.memory`, `class_token`, `head.weight` ..."""
        tensors = {key: tensor for adapter in self.adapters for key, tensor in adapter.state_dict().items()}
        own = {} if self.class_token is None else {"class_token": self.class_token}
        own |= {} if self.head is None else {"head.weight": self.head.weight, "head.bias": self.head.bias}
        return tensors | {key: tensor.detach() for key, tensor in own.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave.

        Raises:
            CheckpointError: Tensors are missing, unexpected, misshapen or not finite; all of them are named, and
                nothing has been changed.
        """
        own = self.check_tensors(tensors)
        with torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(tensors[key])

    def check_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The task's own tensors, if those given can take their place; else the error of `load_tensors`."""
        own = self.tensors()
        problems = misfits(tensors, own)
        if problems:
            raise CheckpointError("the tensors do not fit the adapter:\n  " + "\n  ".join(sorted(problems)))
        return own


def _own_feature(configs: Sequence[AdapterConfig], backbone: Backbone, extends: Mapping[str, Task]) -> int | None:
    """The width of the feature that a method makes for the head; None if that of a token is read."""
    making = {each.method: width for each in configs if (width := each.feature_width(backbone)) is not None}
    if not making:
        return None
    name = next(iter(making))
    if len(configs) > 1 or extends:
        others = [each.method for each in configs if each.method not in making] or "tasks to extend" * bool(extends)
        raise ConfigError(
            f"{name}: got {others or 'it twice'} beside it, but it makes the feature itself, so that there is no task "
            'token to read anything else; leave it out, or set readout="token"'
        )
    return making[name]


def _check_backbone_head(backbone: Backbone, masked: bool) -> None:
    name = type(backbone.model).__name__
    if masked:
        raise UnsupportedBackboneError(
            f"masked=True: got head='backbone', but in masked mode all that the head of {name} reads stays as it is; "
            "the task has a single token, which makes no map. Use masked=False"
        )
    if backbone.family.hides_patches:
        raise UnsupportedBackboneError(
            f"head='backbone': got {name}, whose own head fills in patches that were hidden at random, and an adapted "
            "tower hides none. Use head=None, or a head for labels"
        )


def _check_backbone(
    configs: Sequence[AdapterConfig], backbone: Backbone, masked: bool, *, images_alone: bool = True
) -> None:
    family, name = backbone.family, type(backbone.model).__name__
    if not family.attention_function:
        needs = [config.method for config in configs if find_method(config.method).needs_attention_function]
        reasons = ["masked=True"] * masked + [f"the method {method!r}" for method in needs]
        if reasons:
            raise UnsupportedBackboneError(
                f"{' and '.join(reasons)}: got {name}, whose blocks compute attention themselves, without the function "
                "of transformers' AttentionInterface, so their keys and values cannot be reached. Use masked=False and "
                f"another method (approximated_prompts, lora), or a model with one of the towers {sorted(TOWERS)}"
            )
    if images_alone and not family.images_alone:
        raise UnsupportedBackboneError(
            f"got {name}, which takes text with its images, and this head reads images alone. Use head='backbone' and "
            "call the model with both"
        )
    if masked and family.staged:
        raise UnsupportedBackboneError(
            f"masked=True: got {name}, whose blocks attend {family.staged}, in stages of several widths: no single "
            "token can go along with all of them. Use masked=False, or a backbone with global attention"
        )
