"""Heads in closed form: ridge regression of the labels on the features of the images, without a step of an optimizer.

"RanPAC" (https://arxiv.org/abs/2307.02251) has it on random features, for class-incremental learning: what it needs of
the images are sums, which forget nothing and know no order. The strength of the penalty is chosen by leave-one-out, in
its exact form ("Generalized Cross-Validation as a Method for Choosing a Good Ridge Parameter", Golub, Heath and Wahba,
1979): that image i is left out changes its residual r_i to r_i / (1 - h_i), h_i being what its own answer weighs in it.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import one_hot
from tqdm.auto import tqdm

from ..errors import InputError
from ..models import TunedModel
from ..preparation import TrainingConfig, borrowed_state, check_items, make_accelerator, make_items, make_loader
from ..tasks import MultiLabel, Objective, RandomFeatureHead, Regression
from ..trunk_cache import check_cacheable, to_pass

logger = logging.getLogger(__name__)

RIDGES = tuple(10.0 ** (number / 2) for number in range(-12, 3))
"""The strengths to choose among, as shares of the mean square of a feature over the images."""

TEMPERATURES = tuple(10.0 ** (number / 20) for number in range(61))
"""The factors of the regression's answers to choose among, which lie about 0 and 1, to make logits of them."""

MOST_LEFT_OUT = 10_000
"""Of how many images, drawn at random where there are more, each is left out once."""

_AT_ONCE = 2048  # images whose random features are in memory


@dataclass(frozen=True)
class ClosedFormResult:
    """What `fit_closed_form` found.

    Attributes:
        ridge: The strength of the penalty, as a share of the mean square of a feature over the images.
        temperature: The factor that makes logits of the regression's answers; 1 for numbers.
        loo_score: What images of the data set say, each predicted by the head of all others: the accuracy; of several
            classes an image the share of classes that are right; of numbers r2.
        loo_loss: Their mean loss.
        images: How many images there were.
        seconds: How long it took.
    """

    ridge: float
    temperature: float
    loo_score: float
    loo_loss: float
    images: int
    seconds: float


class FeatureSums:
    """All that a head in closed form needs of images: sums, to which more can be added at any time.

    Args:
        head: The head that they are for; of it the shapes, and the random features if it reads such.
    """

    def __init__(self, head: torch.nn.Linear) -> None:
        self._expand = head.expand if isinstance(head, RandomFeatureHead) else lambda features: features
        self.images = 0
        self.features = torch.zeros(head.in_features, dtype=torch.float64)
        self.squares = torch.zeros(head.in_features, dtype=torch.float64)
        self.of_class = torch.zeros(head.out_features, head.in_features, dtype=torch.float64)
        self.counts = torch.zeros(head.out_features, dtype=torch.float64)
        self._products: Tensor | None = None

    def expanded(self, features: Tensor) -> Tensor:
        """What the head reads (images, width) of features, in float64."""
        return self._expand(features.cpu()).double()

    def add(self, features: Tensor, labels: Tensor, *, products: bool = True) -> None:
        """Add images.

        Args:
            features: Their features, (images, width).
            labels: Their classes, (images,); or numbers, (images, outputs).
            products: Whether to add the products of features as well, without which the sums do not go on.
        """
        for some, classes in zip(features.split(_AT_ONCE), labels.cpu().split(_AT_ONCE), strict=True):
            read = self.expanded(some)
            self.images += len(read)
            self.features += read.sum(dim=0)
            self.squares += read.square().sum(dim=0)
            if classes.is_floating_point():
                self.of_class += classes.double().T @ read
                self.counts += classes.double().sum(dim=0)
            else:
                self.of_class.index_add_(0, classes, read)
                self.counts += torch.bincount(classes, minlength=len(self.counts))
            if products:
                self._products = read.T @ read if self._products is None else self._products.addmm_(read.T, read)

    @property
    def mean(self) -> Tensor:
        """The mean of each feature."""
        return self.features / self.images

    @property
    def deviation(self) -> Tensor:
        """The standard deviation of each feature; 1 where it is always the same."""
        variance = (self.squares / self.images - self.mean.square()).clamp_min(0)
        return torch.where(variance > 1e-12 * self.mean.square() + 1e-30, variance, 1.0).sqrt()

    def standardized(self, features: Tensor) -> Tensor:
        """What the head reads, with a mean of 0 and a variance of 1."""
        return (self.expanded(features) - self.mean) / self.deviation

    def spectrum(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues (number,) and eigenvectors (width, number) of the products of standardised features.

        Args:
            features: Those of all images where the products have not been added: there are fewer images then.
        """
        if self._products is not None:
            centred = self._products - self.images * torch.outer(self.mean, self.mean)
            values, vectors = torch.linalg.eigh(centred / torch.outer(self.deviation, self.deviation))
            return values.clamp_min(0), vectors
        read = self.standardized(features)
        values, vectors = torch.linalg.eigh(read @ read.T)
        kept = values > values[-1] * 1e-12
        return values[kept], read.T @ (vectors[:, kept] / values[kept].sqrt())


@torch.no_grad()
def fit_closed_form(model: TunedModel, train_dataset: Any, config: TrainingConfig | None = None) -> ClosedFormResult:
    """Give a model the head that ridge regression of the labels on its features finds, in one pass over the images.

    The features are standardised; the penalty's strength is the one that is most often right about an image that is
    left out (of numbers, with the smallest squared error), the scale of the logits the one of the least loss there.
    Nothing but the head changes. It is what
    every trained adapter should be compared with. A model that has a head alone takes no step of training then, and
    costs a combined pass nothing: `wrap(backbone, MemoryConfig(tokens=0, class_token=False), labels=...)`. With
    `wrap(..., head=memtune.RandomFeatures())` it is RanPAC's.

    Example:
        >>> alone = memtune.MemoryConfig(tokens=0, class_token=False)
        >>> model = memtune.wrap(backbone, alone, labels=["cat", "dog"], processor=processor)
        >>> memtune.fit_closed_form(model, train_dataset).images
        12

    Args:
        model: The model, masked or not; it is left in evaluation mode.
        train_dataset: Images and labels, as for `fit`; at least two images.
        config: The settings of `fit`; those that concern how images are read (batch size, precision, image size, trunk
            cache, unreadable images) are used. Each image is read once, as it is.

    Raises:
        InputError: An image or a label is wrong, there is only one image, or a feature is not finite. The head is then
            as it was.
        ConfigError: The model has no head, or cannot read a trunk cache.
    """
    start = time.perf_counter()
    head = model.task.require_head("fit_closed_form")
    config = config or TrainingConfig()
    features, labels = read_features(model, train_dataset, config)
    sums = FeatureSums(head)
    sums.add(features, labels, products=len(features) > head.in_features)
    result = solve_head(head, sums, features, labels, model.task.objective)
    seconds = time.perf_counter() - start
    logger.info("%d images, leave-one-out score %.4f, %.0f s", sums.images, result.loo_score, seconds)
    return ClosedFormResult(**{**vars(result), "seconds": seconds})


@torch.no_grad()
def read_features(model: TunedModel, dataset: Any, config: TrainingConfig) -> tuple[Tensor, Tensor]:
    """The features (images, width), float32, and labels of a data set, on the CPU: all of them, in each process.

    Raises:
        InputError: An image or a label is wrong, or a feature is not finite.
        ConfigError: The model cannot read a trunk cache.
    """
    if config.trunk_cache is not None:
        check_cacheable(model)
    features, labels = [], []
    with borrowed_state():
        accelerator = make_accelerator(config)
        items = make_items(model, dataset, config)
        check_items(model, items, config)
        loader: Any = accelerator.prepare_data_loader(make_loader(model, items, config, accelerator))
        model.to(accelerator.device).eval()
        quiet = config.disable_tqdm or not accelerator.is_main_process
        for batch in tqdm(loader, disable=quiet, unit="batch", desc="features"):
            read = _features(model, accelerator, batch, config)
            read, found = accelerator.gather_for_metrics((read, batch["labels"]))
            kept = model.task.objective.kept(found)
            features.append(read[kept].cpu())
            labels.append(found[kept].cpu())
    whole = torch.cat(features)
    if not whole.isfinite().all():
        wrong = (~whole.isfinite().all(dim=1)).nonzero().flatten().tolist()
        raise InputError(
            f"the features of the images {wrong[:10]} are not finite; run in float32, or look at the images"
        )
    return whole, torch.cat(labels)


def _features(model: TunedModel, accelerator: Accelerator, batch: dict[str, Any], config: TrainingConfig) -> Tensor:
    with accelerator.autocast():
        if "trunk" in batch:
            return model.features_of(to_pass(batch["trunk"])).float()
        interpolate = config.image_size is not None
        return model.features(batch["pixel_values"], interpolate_pos_encoding=interpolate).float()


@torch.no_grad()
def solve_head(
    head: torch.nn.Linear, sums: FeatureSums, features: Tensor, labels: Tensor, objective: Objective
) -> ClosedFormResult:
    """Write the solution into a head.

    Args:
        head: The head.
        sums: Those of all images.
        features: Those of the images that are left out in turn, (images, width).
        labels: Their labels, (images,) or (images, outputs).
        objective: What these are.

    Raises:
        InputError: There is only one image.
    """
    if sums.images < 2:
        raise InputError(
            f"got {sums.images} image, expected at least 2: the penalty is found by leaving out each in turn"
        )
    values, vectors = sums.spectrum(features)
    means = sums.counts / sums.images  # of the labels: what is answered for the mean feature
    targets = ((sums.of_class - torch.outer(sums.counts, sums.mean)) / sums.deviation) @ vectors  # (outputs, number)
    left_out = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:MOST_LEFT_OUT]
    read, own_labels = sums.standardized(features[left_out]) @ vectors, labels[left_out]
    truth, squares = _targets(own_labels, len(means)), read.square()
    doubt = 1 / (len(left_out) + 1)  # as if the class of one more had been drawn by lot: no answer is quite certain
    even = 0.5 if isinstance(objective, MultiLabel) else 0.0  # the answer whose logit is 0
    best: ClosedFormResult | None = None
    solution = targets
    for ridge in RIDGES:
        solved = targets / (values + ridge * sums.images)
        weighs = squares @ (1 / (values + ridge * sums.images)) + 1 / sums.images
        residuals = (truth - (read @ solved.T + means)) / (1 - weighs).clamp_min(1e-9).unsqueeze(1)
        answers = truth - residuals
        factors = (1.0,) if isinstance(objective, Regression) else TEMPERATURES
        losses = [objective.loss((answers - even) * f, own_labels, label_smoothing=doubt).item() for f in factors]
        loss, temperature = min(zip(losses, factors, strict=True))
        score = _score(objective, answers, truth)
        if best is None or (-score, loss) < (-best.loo_score, best.loo_loss):
            best = ClosedFormResult(ridge, temperature, score, loss, sums.images, 0.0)
            solution = solved * temperature
    assert best is not None
    weight = (solution @ vectors.T) / sums.deviation
    head.weight.copy_(weight)
    head.bias.copy_((means - even) * best.temperature - weight @ sums.mean)
    return best


def _targets(labels: Tensor, outputs: int) -> Tensor:
    """What is regressed, (images, outputs)."""
    return labels.double() if labels.is_floating_point() else one_hot(labels, outputs).double()


def _score(objective: Objective, answers: Tensor, truth: Tensor) -> float:
    """How good answers are; more is better."""
    if isinstance(objective, Regression):
        spread = (truth - truth.mean(dim=0)).square().sum(dim=0)
        return (1 - (answers - truth).square().sum(dim=0) / spread.clamp_min(1e-30)).mean().item()
    if isinstance(objective, MultiLabel):
        return ((answers >= 0.5) == (truth >= 0.5)).double().mean().item()
    return (answers.argmax(dim=1) == truth.argmax(dim=1)).double().mean().item()
