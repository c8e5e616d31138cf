"""One Optuna study for several workers: a trial whose worker was killed is run again by another one."""

import contextlib
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages._heartbeat import BaseHeartbeat  # what Optuna asks of a storage with heartbeat, not exported
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import TrialState

# A worker says this often that it still lives, and counts as dead after so long a silence
HEARTBEAT_SECONDS = 30
GRACE_SECONDS = 120


class JournalWithHeartbeat(JournalStorage, BaseHeartbeat):
    """A journal file with the heartbeat that Optuna has for databases only; compares the clocks of the machines."""

    def record_heartbeat(self, trial_id: int) -> None:
        # Not if another worker gave the trial up meanwhile
        with contextlib.suppress(UpdateFinishedTrialError):
            self.set_trial_system_attr(trial_id, "heartbeat", time.time())

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        oldest = time.time() - GRACE_SECONDS
        return [
            trial._trial_id
            for trial in self.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
            # A trial that is run again has inherited the heartbeat of the first run
            if max(trial.system_attrs.get("heartbeat", 0.0), (trial.datetime_start or datetime.now()).timestamp()) < oldest
        ]

    def get_heartbeat_interval(self) -> int:
        return HEARTBEAT_SECONDS

    def get_heartbeat_stale_trial_callback(self) -> RetryHeartbeatStaleTrialCallback:
        return RetryHeartbeatStaleTrialCallback()


class SharedStudy(Study):
    """
    A study that ends, for each of its workers, when all of its trials have ended.

    :param max_total_trials: completed and pruned trials of all workers, None for as many as ``optimize`` is told
    """

    max_total_trials: int | None = None

    def optimize(self, func: Callable[[optuna.Trial], Any], *args: Any, **kwargs: Any) -> None:
        if self.max_total_trials is None:
            super().optimize(func, *args, **kwargs)
            return
        n_jobs = kwargs.get("n_jobs", 1)
        waiting = False
        while True:
            with _quiet():
                optuna.storages.fail_stale_trials(self)
            count = Counter(trial.state for trial in self.get_trials(deepcopy=False))
            ended = count[TrialState.COMPLETE] + count[TrialState.PRUNED]
            if ended >= self.max_total_trials:
                break
            free = self.max_total_trials - ended - count[TrialState.RUNNING]
            if free > 0:
                super().optimize(func, **{**kwargs, "n_trials": min(free, n_jobs if n_jobs > 0 else os.cpu_count() or 1)})
            else:
                # The last trials run elsewhere, and a worker may die
                if not waiting:
                    print("Waiting for trials of other workers (Ctrl-C stops waiting)")
                waiting = True
                time.sleep(1)


@contextlib.contextmanager
def create_shared_study(url: str, max_total_trials: int | None) -> Iterator[None]:
    """
    Make ``optuna.create_study``, which the zoo calls, return a shared study.

    :param url: journal file (ends in .log) or database, as for the zoo's --storage
    :param max_total_trials: as for ``SharedStudy``
    """
    original = optuna.create_study

    def create_study(**kwargs: Any) -> Study:
        study = original(**{**kwargs, "storage": _storage(url)})
        shared = SharedStudy(study.study_name, study._storage, study.sampler, study.pruner)
        shared.max_total_trials = max_total_trials
        return shared

    module: Any = optuna
    module.create_study = create_study
    try:
        yield
    finally:
        module.create_study = original


def _storage(url: str) -> BaseStorage:
    """
    :param url: as for ``create_shared_study``
    :return: the storage, with heartbeat
    """
    if url.endswith(".log"):
        return JournalWithHeartbeat(JournalFileBackend(url))
    with _quiet():
        return RDBStorage(
            url,
            heartbeat_interval=HEARTBEAT_SECONDS,
            grace_period=GRACE_SECONDS,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Optuna's warning that heartbeats are experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield
