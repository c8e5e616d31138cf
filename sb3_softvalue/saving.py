"""A model in and out of files: what SB3's save and load have to know about the value network."""

import copy
import io
import pathlib
from typing import Any, TypeVar

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import GymEnv, TensorDict
from stable_baselines3.sac.policies import SACPolicy
from stable_baselines3.sac.sac import SAC

from sb3_softvalue import transfer
from sb3_softvalue.checkpoint import Resumed, load_checkpoint, save_checkpoint

SelfSaving = TypeVar("SelfSaving", bound="Saving")


class Saving(SAC):
    """SAC with a value network as SB3's ``save`` and ``load`` see it."""

    @classmethod
    def load(
        cls: type[SelfSaving],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfSaving:
        """
        Load the model from a zip-file, see ``BaseAlgorithm.load``. ``ent_coef`` may be given anew: a value other than the
        saved one takes effect, also from learned ("auto") to fixed (a number) and back. V was learned with the old
        temperature and needs some updates to follow.

        :param path: path to the file (or a file-like) where to load the agent from
        :param env: the new environment to run the loaded model on
            (can be None if you only need prediction from a trained model) has priority over any saved environment
        :param device: Device on which the code should run.
        :param custom_objects: Dictionary of objects to replace upon loading.
        :param print_system_info: Whether to print system info from the saved model and the current system info
        :param force_reset: Force call to ``reset()`` before training to avoid unexpected behavior.
        :param kwargs: extra arguments to change the model when loading
        :return: new model instance with loaded parameters
        """
        custom_objects = dict(custom_objects or {})
        # The saved temperature is loaded as it was saved, then changed: SB3 fails on a temperature of the other kind
        ent_coef = kwargs.pop("ent_coef", custom_objects.pop("ent_coef", None))
        model: Any = super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)
        if ent_coef is not None and ent_coef != model.ent_coef:
            model.ent_coef = ent_coef
            model._setup_ent_coef()
        return model

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """
        Load parameters from a given zip-file or a nested dictionary, see ``BaseAlgorithm.set_parameters``.

        :param load_path_or_dict: path or file-like (see ``save``), or a copy of what ``get_parameters`` returned
        :param exact_match: If True, the given parameters should include parameters for each module and each of their
            parameters, otherwise raises an Exception.
        :param device: Device on which the code should run.
        """
        if isinstance(load_path_or_dict, dict):
            # PyTorch's optimizers keep the tensors they load, so that two models would go on with one state between them
            load_path_or_dict = copy.deepcopy(load_path_or_dict)
        super().set_parameters(load_path_or_dict, exact_match, device)

    @classmethod
    def from_sac(
        cls: type[SelfSaving],
        path_or_model: str | pathlib.Path | io.BufferedIOBase | SAC,
        env: GymEnv | str | None = None,
        *,
        fit_value_steps: int = 5_000,
        replay_buffer: ReplayBuffer | str | pathlib.Path | None = None,
        **kwargs: Any,
    ) -> SelfSaving:
        """
        Make a SACV of a model that SB3's ``SAC`` trained: its actor, critics and temperature with their optimizers, its
        options, counters and transitions. V, which SAC does not have, is fitted to them before training goes on; nothing else
        is learned here. V̄ takes the place of SAC's target critics.

        A replay buffer is shared with the SAC, not copied. Where it holds fewer than ``collect_steps`` transitions, the policy
        acts in ``env`` until it does, and these steps are counted. ``learning_starts`` is 0 afterwards: the warm-up is over.

        :param path_or_model: SAC model, or what ``SAC.save`` wrote (as with ``SAC.load``: open only files that you trust)
        :param env: to go on in, wrapped in ``VecNormalize`` if the SAC was trained so; None takes the model's own
        :param fit_value_steps: gradient steps that fit V
        :param replay_buffer: transitions, or the path of what ``save_replay_buffer`` wrote (a pickle: only files that you
            trust); None takes those that the model holds
        :param kwargs: ``collect_steps`` (5,000), ``policy`` for a SAC with a policy class of its own, ``device``, and
            arguments of this class in place of the SAC's
        :return: the new model
        :raises ValueError: if the model is no SAC, its policy has no counterpart, the environment does not fit, or there is
            neither an environment nor a replay buffer to fit V on
        """
        fit: dict[str, Any] = dict(fit_value_steps=fit_value_steps, replay_buffer=replay_buffer)
        return transfer.from_sac(cls, path_or_model, env, **fit, **kwargs)

    def to_sac(self, policy: str | type[SACPolicy] | None = None) -> SAC:
        """
        Make a model of SB3's ``SAC`` that predicts the same and can train on, see ``transfer.to_sac``. The replay buffer and
        the environment are shared, not copied: only one of the two models should train on.

        :param policy: the policy class; None takes SB3's own that stands for this model's
        :return: the SAC, whose target critics are copies of the critics
        :raises ValueError: if the policy has no counterpart in SB3 and none is given
        """
        return transfer.to_sac(self, policy)

    def save_checkpoint(self, folder: str | pathlib.Path) -> None:
        """
        Write the whole training to a folder, see ``checkpoint.save_checkpoint``, and ``checkpoint.ResumableCheckpoint`` for
        doing so while it continues.

        :param folder: of the run
        :raises CheckpointError: if it cannot be stored or written
        """
        save_checkpoint(self, folder)

    def load_checkpoint(self, folder: str | pathlib.Path) -> Resumed:
        """
        Continue from the newest checkpoint of a folder, see ``checkpoint.load_checkpoint``.

        :param folder: of the run
        :return: true if the training continues exactly as if it had never stopped; else it says why not
        :raises CheckpointError: if there is none, it is damaged, or it is of another model
        """
        return load_checkpoint(self, folder)

    def _excluded_save_params(self) -> list[str]:
        return [
            *super()._excluded_save_params(),
            "value",
            "value_target",
            "_schedules",
            "_optimizer_step",
            "_update_target",
            "_executor",
            "_backup",
            "_hints",
            "_statistics",
        ]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, variables = super()._get_torch_save_params()
        return [*state_dicts, "value.optimizer"], variables
