"""The folder of a search: what has been tried, so that a run that was stopped goes on.

    journal.log    Optuna's journal, and the only state: the search's settings, the trials, the final runs
    sweep.json     settings and result for readers; trials.csv, the trials as a table; sweep.png, a picture of them
    seed-<n>       the adapter of each final run

The journal grows by whole lines, each on the disk before the next is written: a process killed at any moment loses
nothing but a line that it had not finished, and the trial that it was at.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from filelock import FileLock, Timeout

from ..backbones import same_weights
from ..errors import BackboneMismatchError, CheckpointError, ConfigError, MemtuneError
from ..storage import check_plain, replace_files
from ..training import check_same_run
from .result import FinalRun, SweepResult, Trial
from .space import Space, find_optuna

logger = logging.getLogger(__name__)

JOURNAL_NAME = "journal.log"
LOCK_NAME = ".lock"
STUDY_NAME = "memtune"
FORMAT_VERSION = 1

Sampler: TypeAlias = Any
"""An `optuna.samplers.BaseSampler`, or a function of the keyword `seed` that gives one."""


class SweepFolder:
    """A search on disk. One process at a time works on it.

    Args:
        path: The folder.
        space: What is searched.
        settings: What must be equal for the search to go on, as JSON values.
        weights: The backbone's fingerprint.
        sampler: What proposes trials.
        seed: Of the proposals.
        metric: The score that trials are compared by.
        greater_is_better: Whether larger ones are better.

    Raises:
        ConfigError: Another process works on the folder, or it holds another search.
        BackboneMismatchError: It holds a search on another backbone.
        CheckpointError: Its journal is damaged.
    """

    def __init__(
        self,
        path: Path,
        space: Space,
        settings: Mapping[str, Any],
        weights: Mapping[str, Any],
        sampler: Sampler,
        seed: int,
        *,
        metric: str,
        greater_is_better: bool,
    ) -> None:
        self._path = path
        self._space = space
        self._settings = _plain(settings)
        self._weights = _plain(weights)
        self._sampler = sampler
        self._seed = seed
        self._metric, self._greater = metric, greater_is_better
        self._optuna = find_optuna()
        with ExitStack() as stack:
            path.mkdir(parents=True, exist_ok=True)
            for name in (JOURNAL_NAME, LOCK_NAME):
                if (path / name).is_symlink() or (path / name).exists():
                    check_plain(path / name)
            stack.enter_context(_sole_process(path))
            self._storage, self._study = self._open()
            self._take_over()
            self._locks = stack.pop_all()

    def close(self) -> None:
        """Let other processes work on the folder."""
        self._locks.close()

    def result(self) -> SweepResult:
        """What has been found so far; the final runs are those with the values that are the best ones now."""
        result = SweepResult(self._space.kinds(), self._trials(), metric=self._metric, greater_is_better=self._greater)
        if result.trials:
            saved = self._study.user_attrs.get("finals", [])
            result.finals = [FinalRun(**run["run"]) for run in saved if run["values"] == _plain(result.best.values)]
        return result

    def ask(self, n_trials: int) -> dict[str, Any] | None:
        """The values of the trial to be run next; None if there have been enough, or the sampler has no more.

        A trial that was begun and never finished comes again with the values that it had.
        """
        states = self._optuna.trial.TrialState
        done = len(self._study.get_trials(deepcopy=False, states=(states.COMPLETE,)))
        if done >= n_trials or self._study.user_attrs.get("exhausted") == repr(type(self._sampler)):
            return None
        for begun in self._study.get_trials(states=(states.RUNNING,)):
            if begun.params.keys() == self._space.distributions.keys():
                return self._space.values(begun.params)
            self._study.tell(begun.number, state=states.FAIL)  # killed while it was made
        self._study.sampler = self._next_sampler(done + len(self._given_up()))
        return self._space.values(self._study.ask(self._space.distributions).params)

    def give_up(self) -> int:
        """Mark the trial that `ask` gave as one that cannot be trained; gives how many such there are."""
        states = self._optuna.trial.TrialState
        (begun,) = self._study.get_trials(deepcopy=False, states=(states.RUNNING,))
        self._study.set_user_attr("given_up", [*self._given_up(), begun.number])
        self._study.tell(begun.number, state=states.FAIL)
        return len(self._given_up())

    def _given_up(self) -> list[int]:
        return self._study.user_attrs.get("given_up", [])

    def tell(self, score: float, loss: float, seconds: float, same_as: int | None = None) -> None:
        """Keep what came of the trial that `ask` gave."""
        states = self._optuna.trial.TrialState
        (begun,) = self._study.get_trials(deepcopy=False, states=(states.RUNNING,))
        figures = {"loss": loss, "seconds": seconds, "same_as": same_as}
        study_id = self._storage.get_study_id_from_name(STUDY_NAME)
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(study_id, begun.number)
        self._storage.set_trial_user_attr(trial_id, "memtune", figures)
        try:
            self._study.tell(begun.number, score)
        except RuntimeError:  # how samplers of a finite number of trials say that they have no more
            if self._study.trials[begun.number].state != states.COMPLETE:
                raise
            self._study.set_user_attr("exhausted", repr(type(self._sampler)))

    def add_final(self, values: Mapping[str, Any], run: FinalRun) -> None:
        """Keep a final run with the best values; those with values that were the best once are dropped."""
        saved = [each for each in self._study.user_attrs.get("finals", []) if each["values"] == _plain(values)]
        self._study.set_user_attr("finals", [*saved, {"values": _plain(values), "run": asdict(run)}])

    def write(self, result: SweepResult, *, picture: bool = False) -> None:
        """Replace the files for readers, all at once."""
        values = {"format_version": FORMAT_VERSION, "settings": self._settings, "result": result.to_dict()}
        with replace_files(self._path) as staging:
            (staging / "sweep.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            result.write_table(staging / "trials.csv")
            if picture:
                result.plot(staging / "sweep.png")

    def _open(self) -> tuple[Any, Any]:
        """The storage of the journal and its study, made if they are not there."""
        journal = self._path.resolve() / JOURNAL_NAME
        direction = "maximize" if self._greater else "minimize"
        _cut_torn_line(journal)
        backends = self._optuna.storages.journal
        try:
            # Opened exclusively, not linked: links need a right on Windows that most users lack.
            backend = backends.JournalFileBackend(str(journal), backends.JournalFileOpenLock(str(journal)))
            storage = self._optuna.storages.JournalStorage(backend)
            studies = [each.study_name for each in storage.get_all_studies()]
            if studies not in ([], [STUDY_NAME]):
                raise ConfigError(f"output_dir: {journal} has studies that are not memtune's; take another folder")
            if studies:  # creating it again would write into the journal, though it may be refused
                return storage, self._optuna.load_study(study_name=STUDY_NAME, storage=storage)
            return storage, self._optuna.create_study(study_name=STUDY_NAME, storage=storage, direction=direction)
        except MemtuneError:
            raise
        except Exception as error:  # of every kind, by what the journal says
            raise CheckpointError(f"{journal} is damaged: {error!r}; search in another folder") from error

    def _take_over(self) -> None:
        """Begin a new search, or check that this one is the folder's."""
        own = {"format_version": FORMAT_VERSION, "settings": self._settings, "backbone": self._weights}
        kept: Any = self._study.user_attrs.get("memtune")
        journal = self._path / JOURNAL_NAME
        if kept not in (None, own) and not self._trials():  # of which there is nothing to lose
            journal.unlink()
            self._storage, self._study = self._open()
            kept = None
        if kept is None:
            self._study.set_user_attr("memtune", own)
            return
        try:
            version, saved, weights = kept["format_version"], kept["settings"], kept["backbone"]
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{journal} is damaged: {error!r}") from error
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{self._path} has format version {version}, this memtune reads {FORMAT_VERSION}; update memtune"
            )
        if not same_weights(weights, self._weights):
            raise BackboneMismatchError(
                f"output_dir: {self._path} holds a search on a backbone with other weights; take another folder"
            )
        check_same_run(saved, self._settings, self._path)

    def _next_sampler(self, done: int) -> Any:
        """What proposes the trial after so many; seeded by their number, so that it is the same after a stop."""
        if isinstance(self._sampler, self._optuna.samplers.BaseSampler):
            return self._sampler
        make: Callable[..., Any] = self._sampler or self._optuna.samplers.TPESampler
        return make(seed=int(np.random.SeedSequence([self._seed, done]).generate_state(1)[0]))

    def _trials(self) -> list[Trial]:
        finished = self._study.get_trials(deepcopy=False, states=(self._optuna.trial.TrialState.COMPLETE,))
        return [
            Trial(number, self._space.values(each.params), each.value, **each.user_attrs["memtune"])
            for number, each in enumerate(finished)
        ]


def digest_of_numbers(numbers: Any) -> str:
    """A short text that tells sequences of whole numbers apart."""
    return hashlib.sha256(np.asarray(numbers, dtype="<i8").tobytes()).hexdigest()[:16]


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as they come back from JSON."""
    return json.loads(json.dumps(dict(values)))


def _sole_process(path: Path) -> FileLock:
    """A lock that the system lets go of when the process ends, however it ends."""
    lock = FileLock(path / LOCK_NAME, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ConfigError(
            f"output_dir: another process searches in {path}; wait for it, or take another folder"
        ) from error
    return lock


def _cut_torn_line(journal: Path) -> None:
    """Take off the end of a journal what a killed process had begun to write."""
    if not journal.is_file():
        return
    data = journal.read_bytes()
    start = data[:-1].rfind(b"\n") + 1
    if data and not (data.endswith(b"\n") and _is_json(data[start:])):
        logger.warning("%s: its last line is unfinished and is left out", journal)
        with journal.open("r+b") as file:
            file.truncate(start)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
