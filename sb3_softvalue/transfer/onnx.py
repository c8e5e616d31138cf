"""A trained model as an ONNX graph: raw observations in, actions in the environment's own units and V(s) out."""

import contextlib
import importlib.util
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecNormalize, VecTransposeImage
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper
from torch import nn

# The oldest opset that PyTorch's exporter writes without conversion
_OPSET = 18


def export_onnx(
    model: Any, path: str | pathlib.Path, include_value: bool | None = None, vec_normalize: VecNormalize | None = None
) -> None:
    """
    Write a model as an ONNX graph that needs neither PyTorch nor this package. The batch size is dynamic.

    Inputs are the observations of the environment: "observation" of shape (batch, *shape), or one input per key of a Dict.
    Box observations are float32, or uint8 if the space is; images have the environment's channel order. Discrete,
    MultiDiscrete and MultiBinary observations are int64. Outputs are "action", the deterministic action in the environment's
    own units, float32, shape (batch, *action_shape), and "value", V(s) in the unit of ``predict_values``, shape (batch, 1).
    The export changes neither the model nor the random generators.

    :param model: a SACV
    :param path: path of the file to write
    :param include_value: whether the graph has the output "value" and all observations as inputs; None means True, unless the
        actor sees only some observations (``actor_keys``): then only these are inputs
    :param vec_normalize: normalization of the observations, included in the graph; None uses that of the model's environment
    :raises ImportError: if onnx or onnxscript is not installed
    :raises ValueError: if the model cannot be exported with these arguments, or the normalization does not fit it
    """
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript")):
        raise ImportError(
            "Exporting to ONNX needs onnx and onnxscript: pip install 'sb3_softvalue[onnx]' (or pip install onnx onnxscript)."
        )
    if include_value is None:
        include_value = model.actor.observation_space == model.observation_space
    if include_value and not hasattr(model.policy, "value"):
        raise ValueError(
            f"{type(model).__name__} has no V: export with include_value=False, or convert it with SACV.from_sac first."
        )
    if vec_normalize is not None and not isinstance(vec_normalize, VecNormalize):
        raise ValueError(f"vec_normalize must be a VecNormalize, got {type(vec_normalize).__name__}.")
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    normalize = model.get_vec_normalize_env() if vec_normalize is None else vec_normalize
    space = model.observation_space if include_value else model.actor.observation_space
    outputs = ["action", "value"] if include_value else ["action"]
    parts = space.spaces if isinstance(space, spaces.Dict) else {"observation": space}
    taken = sorted(set(parts) & set(outputs))
    if taken:
        raise ValueError(f"The observations {taken} have the names of the graph's outputs: rename them in the environment.")
    transposed = _transposed(model, list(parts))
    examples = {key: _example(part, key in transposed).to(model.device) for key, part in parts.items()}
    with _preserve_state(model):
        graph = _ExportedModel(model, examples, transposed, include_value, normalize).eval()
        batch = th.export.Dim("batch")
        with warnings.catch_warnings():
            # Warnings about the exporter's internals
            warnings.simplefilter("ignore")
            program = th.onnx.export(
                graph,
                tuple(examples.values()),
                dynamo=True,
                verbose=False,
                input_names=list(examples),
                output_names=outputs,
                dynamic_shapes=(tuple({0: batch} for _ in examples),),
                opset_version=_OPSET,
            )
        assert program is not None
        program.save(str(path), external_data=False)


class _ExportedModel(nn.Module):
    """
    The module that is exported.

    :param model: model with actor and value network
    :param examples: name and example of each input
    :param transposed: inputs that are images with channels last
    :param include_value: whether to return V(s)
    :param normalize: normalization of the observations, or None
    :raises ValueError: if the normalization statistics belong to other observations
    """

    def __init__(
        self,
        model: Any,
        examples: dict[str, th.Tensor],
        transposed: list[str],
        include_value: bool,
        normalize: VecNormalize | None,
    ):
        super().__init__()
        self.actor = model.policy.actor
        self.value = model.policy.value if include_value else None
        self.keys, self.transposed, self.space = list(examples), transposed, model.observation_space
        self.action_shape = model.action_space.shape
        bounds = (model.action_space.low, model.action_space.high)
        self.low, self.high = (th.as_tensor(bound.reshape(-1), device=model.device) for bound in bounds)
        self.moments: dict[str, tuple[th.Tensor, th.Tensor]] = {}
        if normalize is None or not normalize.norm_obs:
            return
        self.clip_obs = normalize.clip_obs
        hidden = set(getattr(self.space, "spaces", ())) - set(examples)
        statistics: Any = normalize.obs_rms
        if not isinstance(statistics, dict):
            statistics = {"observation": statistics}
        for key, rms in statistics.items():
            if key in hidden:
                continue
            if key not in examples:
                raise ValueError(
                    f"vec_normalize normalizes {key!r}, which the model does not observe: pass the one used in training."
                )
            own, other = tuple(examples[key].shape[1:]), rms.mean.shape
            if own != other:
                raise ValueError(
                    f"vec_normalize has statistics of shape {other}, but the model's {key} has shape {own}: pass the one used "
                    "in training."
                )
            # In float64, as in SB3
            moments = np.stack([rms.mean, np.sqrt(rms.var + normalize.epsilon)]).astype(np.float64)
            self.moments[key] = tuple(th.as_tensor(moments, device=model.device))

    def forward(self, *inputs: th.Tensor) -> tuple[th.Tensor, ...]:
        """
        :param inputs: raw observations
        :return: actions and, with ``include_value``, values
        """
        observations = {key: self._prepare(key, obs) for key, obs in zip(self.keys, inputs, strict=True)}
        obs: Any = observations if isinstance(self.space, spaces.Dict) else observations["observation"]
        scaled = th.tanh(self.actor.get_action_dist_params(obs)[0])
        actions = self.low + 0.5 * (scaled + 1.0) * (self.high - self.low)
        actions = actions.to(th.float32).reshape(-1, *self.action_shape)
        return (actions,) if self.value is None else (actions, self.value(obs))

    def _prepare(self, key: str, obs: th.Tensor) -> th.Tensor:
        """:return: the observation after ``VecNormalize.normalize_obs`` and ``VecTransposeImage``"""
        if key in self.moments:
            mean, std = self.moments[key]
            obs = ((obs.double() - mean) / std).clamp(-self.clip_obs, self.clip_obs).float()
        return obs.permute(0, 3, 1, 2) if key in self.transposed else obs


def _example(space: spaces.Space, transposed: bool) -> th.Tensor:
    """
    :param space: the model's space of one input
    :param transposed: whether the environment's images have channels last
    :return: two example observations in the layout of the graph's input (a batch of 1 would be exported as a constant)
    """
    shape = space.shape or ()
    if transposed:
        shape = (*shape[1:], shape[0])
    floats = th.uint8 if space.dtype == np.uint8 else th.float32
    return th.zeros((2, *shape), dtype=floats if isinstance(space, spaces.Box) else th.int64)


def _transposed(model: Any, keys: list[str]) -> list[str]:
    """:return: inputs that are images with channels last in the environment and channels first in the model"""
    env = model.get_env()
    while isinstance(env, VecEnvWrapper):
        if isinstance(env, VecTransposeImage):
            return [] if env.skip else keys if not isinstance(model.observation_space, spaces.Dict) else env.image_space_keys
        env = env.venv
    return []


@contextlib.contextmanager
def _preserve_state(model: Any) -> Iterator[None]:
    """Restore the modules' training modes and the random generators on exit."""
    modes = {module: module.training for module in model.policy.modules()}
    try:
        with th.random.fork_rng():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
