"""The search space for Optuna: that of the zoo for SAC, plus temperature and V's learning rate."""

from typing import Any

import optuna
from rl_zoo3.hyperparams_opt import convert_offpolicy_params, sample_sac_params

HER = ("n_sampled_goal", "goal_selection_strategy")


def sample_sacv_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Sampler for SACV hyperparameters, with the signature of the zoo's samplers. Each trial has all parameters, as the
    multivariate sampler needs: ``temperature_value`` is the fixed or the initial temperature.

    :param trial: trial of the study
    :param n_actions: number of action dimensions
    :param n_envs: number of environments
    :param additional_args: the zoo's arguments about the replay buffer
    :return: arguments of SACV
    """
    sac_params = sample_sac_params(trial, n_actions, n_envs, additional_args)
    vf_learning_rate = trial.suggest_float("vf_learning_rate", 1e-5, 0.002, log=True)
    trial.suggest_categorical("temperature", ["auto", "fixed"])
    trial.suggest_float("temperature_value", 0.001, 1.0, log=True)
    ent_coef = _ent_coef(trial.params)
    # Show the value that is used
    trial.set_user_attr("ent_coef", ent_coef)
    return {**sac_params, "vf_learning_rate": vf_learning_rate, "ent_coef": ent_coef}


def convert_sacv_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    :param sampled_params: stored parameters of a trial
    :return: arguments of SACV
    """
    own = ("temperature", "temperature_value", *HER)
    params = convert_offpolicy_params({name: value for name, value in sampled_params.items() if name not in own})
    params["ent_coef"] = _ent_coef(sampled_params)
    her = {name: sampled_params[name] for name in HER if name in sampled_params}
    # The zoo's converter would pass the HER parameters to the algorithm
    return {**params, "replay_buffer_kwargs": her} if her else params


def _ent_coef(params: dict[str, Any]) -> str | float:
    """:return: SACV's ``ent_coef`` for the parameters of a trial"""
    value: float = params["temperature_value"]
    return value if params["temperature"] == "fixed" else f"auto_{value}"
