"""Registers ``sacv`` with RL Zoo in this process: algorithm, search space, hyperparameters, schedules, callbacks."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import rl_zoo3.callbacks
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from rl_zoo3.utils import ALGOS
from stable_baselines3 import SAC

from sb3_softvalue.sacv import SACV
from sb3_softvalue.zoo.search_space import convert_sacv_params, sample_sacv_params
from sb3_softvalue.zoo.shared_study import create_shared_study

HYPERPARAMS = Path(__file__).with_name("sacv.yml")
LEARNING_RATES = ("qf_learning_rate", "vf_learning_rate", "ent_coef_learning_rate")


def register() -> None:
    """Register ``sacv`` with the zoo; further calls have no effect."""
    if "sacv" in ALGOS:
        return
    ALGOS["sacv"] = SACV
    HYPERPARAMS_SAMPLER["sacv"] = sample_sacv_params
    HYPERPARAMS_CONVERTER["sacv"] = convert_sacv_params
    extend(ExperimentManager, "__init__", _default_hyperparams)
    extend(ExperimentManager, "_preprocess_hyperparams", _more_schedules)
    extend(ExperimentManager, "load_trial", _name_missing_trial)
    extend(ExperimentManager, "hyperparameters_optimization", _share_study)
    extend(rl_zoo3.callbacks.ParallelTrainCallback, "_init_callback", _train_sacv_in_parallel)


def extend(owner: Any, name: str, extension: Callable[..., Any]) -> None:
    """
    Replace a function in place, also for code that has already imported its owner.

    :param owner: class or module
    :param name: name of the function
    :param extension: function called instead, with the original function and the arguments
    """
    original = getattr(owner, name)

    @functools.wraps(original)
    def extended(*args: Any, **kwargs: Any) -> Any:
        return extension(original, *args, **kwargs)

    setattr(owner, name, extended)


def _default_hyperparams(original: Callable[..., None], manager: ExperimentManager, *args: Any, **kwargs: Any) -> None:
    """``ExperimentManager.__init__``: use our hyperparameter file for sacv, unless --conf-file is given."""
    original(manager, *args, **kwargs)
    if manager.algo != "sacv":
        return
    if not kwargs.get("config"):
        manager.config = str(HYPERPARAMS)
    # The zoo treats trial 0 as no trial
    if manager.trial_id == 0 and manager.storage and manager.study_name:
        trial = manager.load_trial(manager.storage, manager.study_name, 0)
        manager.custom_hyperparams = {**trial, **(manager.custom_hyperparams or {})}


def _more_schedules(original: Callable[..., Any], manager: ExperimentManager, hyperparams: dict[str, Any]) -> Any:
    """``ExperimentManager._preprocess_hyperparams``: SACV's learning rates may also be "lin_3e-4" or None."""
    for name in LEARNING_RATES:
        if isinstance(hyperparams.get(name), (str, int, float)):
            schedules = manager._preprocess_schedules({"learning_rate": hyperparams[name]})
            hyperparams[name] = schedules["learning_rate"]
    return original(manager, hyperparams)


def _name_missing_trial(
    original: Callable[..., dict[str, Any]], manager: ExperimentManager, storage: str, study_name: str, *args: Any
) -> dict[str, Any]:
    """``ExperimentManager.load_trial``: name the missing study or trial instead of "list index out of range"."""
    try:
        return original(manager, storage, study_name, *args)
    except (IndexError, KeyError) as error:
        raise ValueError(
            f"{storage} has no trial {manager.trial_id} of a study {study_name!r}: pass --storage, --study-name and "
            "--trial-id as printed by the optimization."
        ) from error


def _share_study(original: Callable[..., None], manager: ExperimentManager) -> None:
    """``ExperimentManager.hyperparameters_optimization``: rerun the trial of a worker that was killed."""
    if manager.algo != "sacv" or manager.storage is None:
        original(manager)
    else:
        with create_shared_study(manager.storage, manager.max_total_trials):
            # SharedStudy counts the trials of all workers
            manager.max_total_trials = None
            original(manager)


def _train_sacv_in_parallel(original: Callable[..., None], callback: rl_zoo3.callbacks.ParallelTrainCallback) -> None:
    """``ParallelTrainCallback._init_callback``: it copies any SAC with ``SAC.load``; a SACV needs ``SACV.load``."""
    with mock.patch.object(rl_zoo3.callbacks, "SAC", SACV if isinstance(callback.model, SACV) else SAC):
        original(callback)
