"""How a tuned model is saved, loaded, and shared on the Hugging Face Hub."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo
from torch import nn
from transformers import PreTrainedModel

from ..backbones import Backbone
from ..storage import (
    CardDetails,
    check_backbone,
    find_folder,
    load_recorded_backbone,
    make_repository,
    make_task,
    public_name,
    push_folder,
    read_folder,
    write_folder,
)
from ..tasks import Task

if TYPE_CHECKING:
    from typing_extensions import Self


class Sharing:
    """`save_pretrained`, `from_pretrained` and `push_to_hub` of `TunedModel`, which has the state."""

    backbone: PreTrainedModel
    task: Task
    processor: Any

    if TYPE_CHECKING:

        def __init__(self, backbone: PreTrainedModel | nn.Module, task: Task, processor: Any = None) -> None: ...
        def train(self, mode: bool = True) -> Any:
            """As `torch.nn.Module` has it."""
            ...

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
        """Save the adapter as a folder. A process killed meanwhile leaves the old adapter or the new one.

        Args:
            save_directory: The folder; made if it is not there, other files in it are left alone.
            base_model_name: The backbone's name to record, where it was loaded from a path of this machine.
            results: For the card: what `memtune.evaluate` gave, such as {"accuracy": 0.93}.
            datasets: For the card: ids of the data sets on the Hub; the results are those of the first.
            training: For the card: the `TrainingConfig` or `transformers.TrainingArguments`.
            is_main_process: Only the main one of several processes writes.

        Raises:
            CheckpointError: The path is a file.
            ConfigError: What is for the card is no number, or no id.
        """
        if is_main_process:
            details = CardDetails(results or {}, datasets, training)
            write_folder(save_directory, self.task, self.backbone, self.processor, base_model_name or None, details)

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
        """Share the adapter on the Hub, in one commit: no one ever sees half of it. Its card is replaced, too.

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
            HubError: The Hub refused or could not be reached; the repository has the old adapter or the new one.
            ConfigError: What is for the card is no number, or no id.
        """
        details = CardDetails(results or {}, datasets, training)  # which refuses what is wrong before anything is made
        repo_id = make_repository(repo_id, private=private, token=token)
        details = dataclasses.replace(details, repo_id=repo_id)
        name = public_name(base_model_name or self.backbone.name_or_path) or ""  # no path of this machine gets out
        with TemporaryDirectory() as folder:
            write_folder(folder, self.task, self.backbone, self.processor, name, details)
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
        """Load an adapter onto its backbone, from a folder or from the Hub.

        Args:
            source: The adapter folder, or `user/name` on the Hub; a folder of that name goes first.
            backbone: The frozen backbone, loaded already; None to load it by the name that the adapter recorded.
            any_weights: Accept a backbone of the right shape with other weights than the adapter was trained on.
            revision: Branch, tag, pull request (`refs/pr/1`) or commit of the adapter; by default `main`.
            subfolder: The adapter's folder within the folder or repository.
            token: A token of the Hub; by default the one that was stored at login, False for none.
            cache_dir: Where files from the Hub are kept; by default huggingface_hub's own place.
            local_files_only: Do not reach out; take what is in the cache.
            force_download: Fetch the adapter's files again.

        Returns:
            The model in evaluation mode.

        Raises:
            HubError: The adapter cannot be had from the Hub.
            CheckpointError: The folder is missing, incomplete, damaged or of an unknown format.
            BackboneMismatchError: The backbone is not the one that the adapter was trained on.
        """
        access: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        folder = find_folder(source, revision=revision, subfolder=subfolder, force_download=force_download, **access)
        adapter = read_folder(folder)
        model = load_recorded_backbone(adapter, **access) if backbone is None else backbone
        described = Backbone(model)
        check_backbone(adapter, described, any_weights=any_weights)
        tuned = cls(model, make_task(adapter, described), processor=adapter.processor)
        tuned.train(False)
        return tuned
