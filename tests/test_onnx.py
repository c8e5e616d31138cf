"""The exported graph computes what the model predicts, from raw observations, without PyTorch."""

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_softvalue.transfer import export_onnx
from tests.helpers import SMALL, RandomEnv, box_env, dict_space, filled, rng_state, train

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
# The exporter's dependencies, not ours; the synthetic environments give large rewards
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:Rewards average .* values reach about:UserWarning"
)

IMAGE = spaces.Box(0, 255, shape=(36, 36, 1), dtype=np.uint8)
SMALL_CNN = dict(net_arch=[8], features_extractor_kwargs=dict(features_dim=8))
CASES: dict[str, Any] = {
    "vector": (box_env, "MlpPolicy", {}),
    "gSDE": (box_env, "MlpPolicy", dict(use_sde=True)),
    "float64, action matrix": (
        lambda: RandomEnv(
            spaces.Box(-5.0, 5.0, shape=(2, 2), dtype=np.float64), spaces.Box(-30.0, 70.0, shape=(2, 3), dtype=np.float32)
        ),
        "MlpPolicy",
        {},
    ),
    "Discrete": (lambda: RandomEnv(spaces.Discrete(5)), "MlpPolicy", {}),
    "MultiDiscrete": (lambda: RandomEnv(spaces.MultiDiscrete([3, 4])), "MlpPolicy", {}),
    "MultiBinary": (lambda: RandomEnv(spaces.MultiBinary(4)), "MlpPolicy", {}),
    "Dict": (lambda: RandomEnv(dict_space()), "MultiInputPolicy", {}),
    "image": (lambda: RandomEnv(IMAGE), "CnnPolicy", dict(policy_kwargs=SMALL_CNN)),
    "Dict with image": (
        lambda: RandomEnv(dict_space(image=True)),
        "MultiInputPolicy",
        dict(policy_kwargs=dict(net_arch=[8], features_extractor_kwargs=dict(cnn_output_dim=8))),
    ),
}


def outputs(path: Any, raw: Any) -> list[np.ndarray]:
    """What onnxruntime computes from raw observations."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    raw = raw if isinstance(raw, dict) else {"observation": raw}
    kinds = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8, "tensor(int64)": np.int64}
    return session.run(None, {i.name: np.asarray(raw[i.name]).astype(kinds[i.type]) for i in session.get_inputs()})


def samples(space: spaces.Space, n: int) -> Any:
    """Random observations as an environment gives them, stacked."""
    space.seed(3)
    drawn = [space.sample() for _ in range(n)]
    return (
        {key: np.stack([one[key] for one in drawn]) for key in space.spaces} if isinstance(drawn[0], dict) else np.stack(drawn)
    )


def assert_agrees(path: Any, model: Any, raw: Any, seen: Any) -> None:
    """:param seen: the observations as the model sees them"""
    action, value = outputs(path, raw)
    expected = model.predict(seen, deterministic=True)[0], model.predict_values(seen)
    assert action.shape == expected[0].shape and value.shape == (len(action), 1)
    # In half ranges of the action where these are wide: one bit of a float32 is 8e-6 at 70
    unit = np.maximum(1.0, (model.action_space.high - model.action_space.low) / 2.0)
    difference = max(np.abs((action - expected[0]) / unit).max(), np.abs(value[:, 0] - expected[1]).max())
    print(f"maximal difference {difference:.1e}")
    assert difference <= 1e-5


@pytest.mark.parametrize("make_env, policy, options", CASES.values(), ids=CASES)
def test_agrees_with_predict(make_env, policy, options, tmp_path):
    env = make_env()
    model = filled(env, policy, **options)
    train(model, 5)
    export_onnx(model, tmp_path / "model.onnx")
    raw = samples(env.observation_space, 1000)
    assert_agrees(tmp_path / "model.onnx", model, raw, raw)


@pytest.mark.parametrize("space", [box_env().observation_space, dict_space()], ids=["vector", "Dict"])
def test_vec_normalize(space, tmp_path):
    is_dict = isinstance(space, spaces.Dict)
    keys = ["vector"] if is_dict else None
    env = VecNormalize(DummyVecEnv([lambda: RandomEnv(space)]), norm_obs_keys=keys, clip_obs=1.0)
    model = filled(env, "MultiInputPolicy" if is_dict else "MlpPolicy")
    train(model, 5)
    export_onnx(model, tmp_path / "model.onnx")
    raw = samples(space, 1000)
    seen = env.normalize_obs(raw)
    assert np.abs(seen["vector"] if is_dict else seen).max() == 1.0, "the clipping is seen"
    assert_agrees(tmp_path / "model.onnx", model, raw, seen)


def test_leaves_everything_as_it_was(tmp_path):
    model = filled(box_env())
    train(model, 3)
    model.policy.set_training_mode(True)
    before = [param.clone() for param in model.policy.parameters()], rng_state(), model.actor.training
    export_onnx(model, tmp_path / "model.onnx", include_value=False)
    assert len(outputs(tmp_path / "model.onnx", np.zeros((7, 3)))) == 1
    assert all(map(th.equal, before[0], model.policy.parameters()))
    assert th.equal(before[1][1], th.get_rng_state()) and np.array_equal(before[1][0][1], np.random.get_state()[1])
    assert model.actor.training is before[2] is True


def test_missing_package(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'sb3_softvalue\[onnx\]'"):
        export_onnx(filled(box_env()), tmp_path / "model.onnx")


def test_the_folder_is_made(tmp_path):
    path = tmp_path / "new" / "deep" / "model.onnx"
    export_onnx(filled(box_env()), path)
    assert path.is_file()


def test_refused(tmp_path):
    path = tmp_path / "model.onnx"
    named = RandomEnv(spaces.Dict(action=spaces.Box(-1.0, 1.0, (2,)), value=spaces.Discrete(3)))
    model = filled(named, policy="MultiInputPolicy")
    with pytest.raises(
        ValueError, match=r"The observations \['action', 'value'\] have the names of the graph's outputs: rename"
    ):
        export_onnx(model, path)
    with pytest.raises(ValueError, match=r"The observations \['action'\] have the names"):
        export_onnx(model, path, include_value=False)
    with pytest.raises(ValueError, match=r"SAC has no V: export with include_value=False, or convert it with SACV\.from_sac"):
        export_onnx(SAC("MlpPolicy", box_env(), **SMALL), path)
    with pytest.raises(ValueError, match="vec_normalize must be a VecNormalize, got str"):
        export_onnx(filled(box_env()), path, vec_normalize="vecnormalize.pkl")
    other = VecNormalize(DummyVecEnv([lambda: RandomEnv(IMAGE)]), norm_obs=True)
    with pytest.raises(ValueError, match=r"statistics of shape \(36, 36, 1\), but the model's observation has shape \(3,\)"):
        export_onnx(filled(box_env()), path, vec_normalize=other)
    other = VecNormalize(DummyVecEnv([lambda: RandomEnv(spaces.Dict(other=box_env().observation_space))]))
    with pytest.raises(ValueError, match="normalizes 'other', which the model does not observe"):
        export_onnx(filled(box_env()), path, vec_normalize=other)
    assert not path.exists()
