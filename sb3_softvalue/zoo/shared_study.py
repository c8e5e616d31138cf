"""One Optuna study for several workers: if a worker is killed, another one reruns its trial."""

import contextlib
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any
from unittest import mock

import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages._heartbeat import BaseHeartbeat  # Optuna's interface for storages with heartbeat, not exported
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import TrialState

# Interval of a worker's heartbeats, and silence after which it counts as dead
HEARTBEAT_SECONDS = 30
GRACE_SECONDS = 120


class JournalWithHeartbeat(JournalStorage, BaseHeartbeat):
    """A journal file with heartbeats, which Optuna has for databases only; the clocks of the machines must agree."""

    def record_heartbeat(self, trial_id: int) -> None:
        # Another worker may have marked the trial as failed
        with contextlib.suppress(UpdateFinishedTrialError):
            self.set_trial_system_attr(trial_id, "heartbeat", time.time())

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        oldest = time.time() - GRACE_SECONDS
        return [
            trial._trial_id
            for trial in self.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
            # A rerun trial inherits the heartbeat of the first run
            if max(trial.system_attrs.get("heartbeat", 0.0), (trial.datetime_start or datetime.now()).timestamp()) < oldest
        ]

    def get_heartbeat_interval(self) -> int:
        return HEARTBEAT_SECONDS

    def get_heartbeat_stale_trial_callback(self) -> RetryHeartbeatStaleTrialCallback:
        return RetryHeartbeatStaleTrialCallback()


class SharedStudy(Study):
    """A study in which ``optimize`` returns, for each worker, when all trials have ended."""

    max_total_trials: int
    """Completed and pruned trials of all workers"""

    def optimize(self, func: Callable[[optuna.Trial], Any], *args: Any, **kwargs: Any) -> None:
        n_jobs = kwargs.get("n_jobs", 1)
        waiting = False
        while True:
            optuna.storages.fail_stale_trials(self)
            count = Counter(trial.state for trial in self.get_trials(deepcopy=False))
            ended = count[TrialState.COMPLETE] + count[TrialState.PRUNED]
            if ended >= self.max_total_trials:
                break
            free = self.max_total_trials - ended - count[TrialState.RUNNING]
            if free > 0:
                super().optimize(func, **{**kwargs, "n_trials": min(free, n_jobs if n_jobs > 0 else os.cpu_count() or 1)})
            else:
                # Other workers run the last trials, and one of them may die
                if not waiting:
                    print("Waiting for trials of other workers (Ctrl-C stops waiting)")
                waiting = True
                time.sleep(1)


@contextlib.contextmanager
def create_shared_study(url: str, max_total_trials: int | None) -> Iterator[None]:
    """
    Make ``optuna.create_study``, which the zoo calls, return a shared study.

    :param url: journal file (ending in .log) or database, as for the zoo's --storage
    :param max_total_trials: see ``SharedStudy``; None leaves it to the arguments of ``optimize``
    """
    original = optuna.create_study

    def create_study(**kwargs: Any) -> Study:
        study = original(**{**kwargs, "storage": _storage(url)})
        if max_total_trials is None:
            return study
        shared = SharedStudy(study.study_name, study._storage, study.sampler, study.pruner)
        shared.max_total_trials = max_total_trials
        return shared

    with warnings.catch_warnings(), mock.patch.object(optuna, "create_study", create_study):
        warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeats
        yield


def _storage(url: str) -> BaseStorage:
    """:return: the storage with heartbeats"""
    if url.endswith(".log"):
        return JournalWithHeartbeat(JournalFileBackend(url))
    return RDBStorage(
        url,
        heartbeat_interval=HEARTBEAT_SECONDS,
        grace_period=GRACE_SECONDS,
        heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
    )
