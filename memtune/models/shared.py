"""What the models that users hold have in common: Hugging Face's conventions, and how they are saved and shared."""

from __future__ import annotations

import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import torch
from huggingface_hub import CommitInfo
from torch import nn
from transformers import PreTrainedModel

from ..backbones import Backbone
from ..errors import InputError
from ..storage import CardDetails, hub_name, make_repository, public_name, push_folder
from .prediction import Classify, Prediction, Predictions, check_options, is_one, predict_each

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)


class SharedModel(nn.Module, ABC):
    """A model around a frozen backbone, which Hugging Face's tools (pipelines, trainers) know as a vision model.

    Attributes:
        backbone: The frozen model.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)

    backbone: PreTrainedModel

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """The backbone's type of numbers; an adapter's own parameters may be of another."""
        return self.backbone.dtype

    def can_generate(self) -> bool:
        """Whether it writes text: no."""
        return False

    def predict(
        self,
        images: Any,
        *,
        top_k: int | None = 5,
        batch_size: int = 16,
        on_error: Literal["raise", "skip"] = "raise",
        image_processor: Any = None,
        tasks: Sequence[str] | None = None,
    ) -> Any:
        """Classify images in whatever form: files, folders, pictures.

        Args:
            images: A path, a PIL image, an array (height, width, channels), bytes; a folder, whose images are taken
                with those of its folders; a pattern such as `photos/*.jpg`; or a list, a data set or an array (images,
                height, width, channels) of such.
            top_k: How many answers for each image and task; None for one for each label.
            batch_size: Images a pass.
            on_error: "raise" at an image that cannot be read; or "skip" it: `problems` says what is wrong.
            image_processor: The image processor; by default the one that the model, or its tasks, brought along.
            tasks: Of a model of many tasks those to answer; None for all that have labels.

        Returns:
            `Predictions`, a list in the order of the images, with their names as `images`: of each image the best
            labels, {"label", "score"}, the best first; of a model of many tasks a dictionary of these by task, from one
            pass. For one image not in a list: its answers alone.

        Raises:
            InputError: An image cannot be read, or a folder has none.
            ConfigError: An option is wrong, there is no image processor, or a task has no labels.
        """
        one = is_one(images)
        found = self.predict_each(
            [images] if one else images,
            top_k=top_k,
            batch_size=batch_size,
            on_error="skip" if one else on_error,
            image_processor=image_processor,
            tasks=tasks,
        )
        predictions = Predictions(found)
        if not one:
            return predictions
        if predictions.problems:
            raise InputError(next(iter(predictions.problems.values())))
        return predictions[0]

    def predict_each(
        self,
        images: Any,
        *,
        top_k: int | None = 5,
        batch_size: int = 16,
        on_error: Literal["raise", "skip"] = "raise",
        image_processor: Any = None,
        tasks: Sequence[str] | None = None,
    ) -> Iterator[Prediction]:
        """The same, one image after another, without keeping them (see `predict`)."""
        classify, processor = self._classifier(tasks)
        processor = processor if image_processor is None else image_processor
        check_options(top_k, batch_size, on_error, processor)
        return predict_each(
            images,
            classify,
            processor,
            channels=Backbone(self.backbone).channels,
            place=(self.device, self.dtype),
            top_k=top_k,
            batch_size=batch_size,
            on_error=on_error,
        )

    @abstractmethod
    def _classifier(self, tasks: Sequence[str] | None) -> tuple[Classify, Any]:
        """What gives the scores of some tasks, and the tasks' image processor or None.

        Raises:
            ConfigError: There is no such task, one without labels, or they have several processors.
        """

    def _details(
        self, results: Mapping[str, float] | None, datasets: str | Sequence[str], training: Any
    ) -> CardDetails:
        """What a card is to say, checked."""
        return CardDetails(results or {}, datasets, training)

    @abstractmethod
    def _write(self, folder: str | Path, name: str | None, details: CardDetails) -> None:
        """Save it as a folder, all at once.

        Args:
            folder: Where to.
            name: The backbone's name to record in place of the one that it was loaded by; "" for none.
            details: What the card says beyond the files.
        """

    @classmethod
    @abstractmethod
    def _open(
        cls,
        source: str | Path,
        backbone: PreTrainedModel | nn.Module | None,
        any_weights: bool,
        place: Mapping[str, Any],
    ) -> Self:
        """Load what `_write` wrote, from a folder or the Hub (`place`: the other arguments of `from_pretrained`)."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        base_model_name: str | None = None,
        results: Mapping[str, float] | None = None,
        datasets: str | Sequence[str] = (),
        training: Any = None,
        is_main_process: bool = True,
    ) -> None:
        """Save as a folder: an adapter, or of a model of many tasks an adapter folder for each, usable alone as well.

        A process killed meanwhile leaves of each adapter the old one or the new one.

        Args:
            save_directory: The folder; made if it is not there, other files in it are left alone.
            base_model_name: The backbone's name to record, where it was loaded from a path of this machine.
            results: For an adapter's card: what `memtune.evaluate` gave, such as {"accuracy": 0.93}.
            datasets: For its card: ids of the data sets on the Hub; the results are those of the first.
            training: For its card: the `TrainingConfig` or `transformers.TrainingArguments`.
            is_main_process: Only the main one of several processes writes.

        Raises:
            CheckpointError: The path is a file.
            ConfigError: What is for the card is no number, or no id; or the model is one of many tasks.
        """
        if is_main_process:
            self._write(save_directory, base_model_name or None, self._details(results, datasets, training))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        base_model_name: str | None = None,
        results: Mapping[str, float] | None = None,
        datasets: str | Sequence[str] = (),
        training: Any = None,
    ) -> CommitInfo:
        """Share it on the Hub, in one commit: no one ever sees half of it. Its card is replaced, too.

        Args:
            repo_id: `user/name`, or a name in your own space; made if it is not there.
            commit_message: First line of the commit's message.
            commit_description: The rest of it.
            private: Whether a new repository is private; by default what your settings on the Hub say.
            token: A token that may write; by default the one that was stored at login.
            revision: Branch to commit to, made if it is not there; by default `main`.
            create_pr: Open a pull request in place of a commit on the branch.
            base_model_name: The backbone's name on the Hub, where it was loaded from a path of this machine.
            results: For the card, as for `save_pretrained`.
            datasets: The same.
            training: The same.

        Returns:
            The commit: `oid`, `commit_url`, and `pr_url` of a pull request. If nothing has changed, the last one.

        Raises:
            HubError: The Hub refused or could not be reached; the repository has what it had, or all that is new.
            ConfigError: As for `save_pretrained`.
        """
        details = self._details(results, datasets, training)  # which refuses what is wrong before anything is made
        repo_id = make_repository(repo_id, private=private, token=token)
        details = dataclasses.replace(details, repo_id=repo_id)
        named = public_name(base_model_name) if base_model_name else hub_name(self.backbone)
        name = named or ""  # no path of this machine gets out
        if not name:
            logger.warning(
                "the backbone's name %r is not recorded, as it may be that of a folder of this machine: whoever loads "
                "the adapter passes backbone=..., unless you name the backbone's place on the Hub by base_model_name",
                base_model_name or self.backbone.name_or_path,
            )
        with TemporaryDirectory() as folder:
            self._write(folder, name, details)
            return push_folder(
                Path(folder),
                repo_id,
                revision=revision,
                commit_message=commit_message,
                commit_description=commit_description,
                create_pr=create_pr,
                token=token,
            )

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        backbone: PreTrainedModel | nn.Module | None = None,
        *,
        any_weights: bool = False,
        revision: str | None = None,
        subfolder: str | None = None,
        token: bool | str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> Self:
        """Load what `save_pretrained` saved or `push_to_hub` shared onto its backbone, from a folder or from the Hub.

        Args:
            source: The folder, or `user/name` on the Hub; a folder of that name goes first.
            backbone: The frozen backbone, loaded already; None to load it by the name that was recorded.
            any_weights: Accept a backbone of the right shape with other weights than an adapter was trained on.
            revision: Branch, tag, pull request (`refs/pr/1`) or commit on the Hub; by default `main`.
            subfolder: The folder within the folder or repository.
            token: A token of the Hub; by default the one that was stored at login, False for none.
            cache_dir: Where files from the Hub are kept; by default huggingface_hub's own place.
            local_files_only: Do not reach out; take what is in the cache.
            force_download: Fetch the files again.

        Returns:
            The model in evaluation mode.

        Raises:
            HubError: It cannot be had from the Hub.
            CheckpointError: The folder is missing, incomplete, damaged or of an unknown format.
            BackboneMismatchError: The backbone is not the one that an adapter was trained on.
        """
        place = {
            "revision": revision,
            "subfolder": subfolder,
            "force_download": force_download,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
        }
        return cls._open(source, backbone, any_weights, place)
