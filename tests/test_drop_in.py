"""What code written for SB3's SAC relies on holds for SACV too."""

import copy
import inspect
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.sac.policies import Actor, SACPolicy
from torch import nn

import sb3_softvalue
from sb3_softvalue import SACV
from tests.helpers import MODEL_LIST, RandomEnv, box_env, differs, filled, parameters_of, small, train


def test_constructor_is_sacs():
    """Fails when a new release of SB3 adds, drops or renames an argument."""
    ours = list(inspect.signature(SACV).parameters.values())
    theirs = list(inspect.signature(SAC).parameters.values())
    for our, their in zip(ours, theirs, strict=False):
        assert (our.name, our.default, our.kind) == (their.name, their.default, their.kind)
    assert len(ours) > len(theirs)
    added = ours[len(theirs) :]
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in added)
    assert all(parameter.default is not inspect.Parameter.empty for parameter in added)


@pytest.mark.parametrize("method", ["learn", "train", "load", "predict", "save", "set_parameters"])
def test_method_signatures_are_sacs(method):
    ours = inspect.signature(getattr(SACV, method)).parameters
    theirs = inspect.signature(getattr(SAC, method)).parameters
    assert list(ours) == list(theirs)
    for name in theirs:
        assert ours[name].kind is theirs[name].kind
        if name != "tb_log_name":
            assert ours[name].default == theirs[name].default, name
    if method == "learn":
        assert ours["tb_log_name"].default == "SACV"


def test_policy_constructor_is_sacs():
    for name in ("MlpPolicy", "CnnPolicy", "MultiInputPolicy"):
        ours = inspect.signature(SACV.policy_aliases[name]).parameters
        theirs = inspect.signature(SAC.policy_aliases[name]).parameters
        if name == "MultiInputPolicy":  # hands all arguments but its own one to SB3's
            assert list(ours) == ["args", "actor_keys", "kwargs"] and ours["actor_keys"].default is None
        else:
            assert list(ours) == list(theirs)
            assert [parameter.default for parameter in ours.values()] == [parameter.default for parameter in theirs.values()]
        assert SACV.policy_aliases[name] is getattr(sb3_softvalue, name)


def test_names():
    # Model cards and RL Zoo derive names and folders from it
    assert SACV.__name__.lower() == "sacv"
    assert issubclass(SACV, SAC)
    assert isinstance(small(SACV, box_env()).policy, SACPolicy)
    assert set(sb3_softvalue.__all__) >= {"SACV", "MlpPolicy", "CnnPolicy", "MultiInputPolicy", "__version__"}


@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_attributes(model_class):
    model = small(model_class, box_env()).learn(15)
    assert isinstance(model, SAC)
    assert model.actor is model.policy.actor and model.critic is model.policy.critic
    assert isinstance(model.actor, Actor)
    for layers in (model.actor.latent_pi, model.critic.qf0, model.critic.qf1):
        assert isinstance(layers, nn.Sequential)
    for layer in (model.actor.mu, model.actor.log_std):
        assert isinstance(layer, nn.Linear)
    assert model.critic.n_critics == 2 and len(model.critic.q_networks) == 2
    assert model.log_ent_coef.shape == (1,) and model.log_ent_coef.requires_grad
    assert isinstance(model.ent_coef_optimizer, th.optim.Adam)
    assert model.target_entropy == -2.0
    assert model.replay_buffer.size() == 15
    assert model.logger is not None and model._n_updates == 5

    fixed = small(model_class, box_env(), ent_coef=0.2)
    assert fixed.ent_coef_optimizer is None and fixed.log_ent_coef is None
    assert fixed.ent_coef_tensor.shape == () and fixed.ent_coef_tensor.item() == pytest.approx(0.2)


@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_temperature_arguments(model_class):
    model = small(model_class, box_env(), ent_coef="auto_0.1", target_entropy=-0.7)
    assert model.log_ent_coef.exp().item() == pytest.approx(0.1)
    assert model.target_entropy == -0.7
    assert small(model_class, box_env(), target_entropy="-3").target_entropy == -3.0
    matrix = spaces.Box(-1.0, 1.0, shape=(2, 3), dtype=np.float32)
    assert small(model_class, RandomEnv(box_env().observation_space, matrix)).target_entropy == -6.0


def dims(network: nn.Sequential) -> list[int]:
    return [layer.out_features for layer in network if isinstance(layer, nn.Linear)]


@pytest.mark.parametrize(
    "net_arch, actor, critic, value",
    [
        (None, [256, 256], [256, 256, 1], [256, 256, 1]),
        ([], [], [1], [1]),
        ([5, 4], [5, 4], [5, 4, 1], [5, 4, 1]),
        (dict(pi=[5], qf=[6, 7]), [5], [6, 7, 1], [6, 7, 1]),
        (dict(pi=[5], qf=[6], vf=[7, 8]), [5], [6, 1], [7, 8, 1]),
        (dict(pi=[5], qf=[6], vf=[]), [5], [6, 1], [1]),
    ],
)
def test_net_arch(net_arch, actor, critic, value):
    model = small(SACV, box_env(), policy_kwargs=dict(net_arch=net_arch))
    assert dims(model.actor.latent_pi) == actor
    assert dims(model.critic.qf0) == dims(model.critic.qf1) == critic
    assert dims(model.value.vf) == dims(model.value_target.vf) == value
    model.learn(12)


@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_policy_kwargs(model_class):
    policy_kwargs = dict(
        net_arch=[6],
        n_critics=3,
        activation_fn=nn.Tanh,
        features_extractor_class=FlattenExtractor,
        optimizer_class=th.optim.AdamW,
        optimizer_kwargs=dict(weight_decay=0.1, eps=1e-5),
        share_features_extractor=True,
    )
    model = small(model_class, box_env(), policy_kwargs=policy_kwargs).learn(15)
    assert len(model.critic.q_networks) == 3
    networks = [model.actor.latent_pi, model.critic.qf2] + ([model.value.vf] if model_class is SACV else [])
    assert all(isinstance(network[1], nn.Tanh) for network in networks)
    for network in [model.actor, model.critic] + ([model.value] if model_class is SACV else []):
        assert type(network.optimizer) is th.optim.AdamW
        assert network.optimizer.param_groups[0]["weight_decay"] == 0.1
        assert network.optimizer.param_groups[0]["eps"] == 1e-5


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_adam_implementation_can_be_chosen(implementation):
    policy_kwargs = dict(net_arch=[8], optimizer_kwargs={implementation: True})
    model = small(SACV, box_env(), policy_kwargs=policy_kwargs).learn(12)
    for network in (model.actor, model.critic, model.value):
        assert network.optimizer.param_groups[0][implementation] is True


@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_sde_kwargs(model_class):
    policy_kwargs = dict(net_arch=[8], log_std_init=-1.5, use_expln=True, clip_mean=1.0)
    model = small(model_class, box_env(), use_sde=True, policy_kwargs=policy_kwargs).learn(15)
    assert model.actor.use_sde and model.actor.use_expln and model.actor.clip_mean == 1.0
    fresh = small(model_class, box_env(), use_sde=True, policy_kwargs=policy_kwargs)
    assert th.all(fresh.actor.log_std == -1.5)


@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_one_noise_matrix_for_each_gradient_step(model_class, monkeypatch):
    model = small(model_class, box_env(), use_sde=True)
    model.learn(10)
    matrices = []
    reset_noise = model.actor.reset_noise

    def recording_reset_noise(batch_size: int = 1) -> None:
        reset_noise(batch_size)
        matrices.append(model.actor.action_dist.exploration_mat.detach().clone())

    monkeypatch.setattr(model.actor, "reset_noise", recording_reset_noise)
    train(model, 4)
    assert len(matrices) == 4
    assert all(not th.equal(first, second) for first, second in pairwise(matrices))


@pytest.mark.parametrize(
    "train_freq, gradient_steps, n_updates",
    [
        # 40 steps of which 10 collect only
        (1, 1, 30),
        (1, 3, 90),
        # After steps 12, 16, ..., 40
        (4, 1, 8),
        (4, -1, 32),
        ((4, "step"), 2, 16),
        # Episodes of 10 steps: after steps 20, 30 and 40
        ((1, "episode"), 1, 3),
        ((1, "episode"), -1, 30),
        # After steps 20 and 40
        ((2, "episode"), -1, 40),
    ],
)
@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_train_freq(model_class, train_freq, gradient_steps, n_updates):
    model = small(model_class, box_env(), train_freq=train_freq, gradient_steps=gradient_steps)
    model.learn(40)
    assert model._n_updates == n_updates
    assert model.num_timesteps == 40


@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_every_parameter_learns(model_class):
    """None is forgotten by its optimizer."""
    model = small(model_class, box_env(), tau=0.5)
    before = parameters_of(model.policy)
    model.learn(20)
    after = parameters_of(model.policy)
    unmoved = [name for name in before if th.equal(after[name], before[name])]
    assert unmoved == []


class CountTraining(BaseCallback):
    """What SB3's callbacks may look at."""

    def __init__(self) -> None:
        super().__init__()
        self.n_updates: list[int] = []

    def _on_step(self) -> bool:
        assert isinstance(self.model, SAC)
        assert set(self.locals) >= {"rewards", "dones", "infos", "replay_buffer"}
        self.n_updates.append(self.model._n_updates)
        return self.num_timesteps < 25


@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_callback(model_class):
    callback = CountTraining()
    model = small(model_class, box_env()).learn(100, callback=callback)
    assert model.num_timesteps == 25
    assert callback.n_updates == [0] * 11 + list(range(1, 15))


@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_learn_arguments(model_class, tmp_path):
    model = small(model_class, box_env(), tensorboard_log=str(tmp_path))
    model.learn(15, callback=None, log_interval=1, tb_log_name="mine", reset_num_timesteps=True, progress_bar=False)
    model.learn(15, reset_num_timesteps=False, tb_log_name="mine")
    assert model.num_timesteps == 30
    assert [folder.name for folder in tmp_path.iterdir()] == ["mine_1"]
    model.learn(15)
    assert {folder.name for folder in tmp_path.iterdir()} == {"mine_1", f"{model_class.__name__}_1"}


@pytest.mark.parametrize("model_class", MODEL_LIST)
# rich's and tqdm's own
@pytest.mark.filterwarnings("ignore:rich is experimental")
def test_progress_bar(model_class):
    small(model_class, box_env()).learn(15, progress_bar=True)


@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_console_log(model_class, capsys):
    small(model_class, box_env(), verbose=1).learn(40, log_interval=1)
    output = capsys.readouterr().out
    for name in ("actor_loss", "critic_loss", "ent_coef_loss", "ent_coef ", "learning_rate", "n_updates"):
        assert f"    {name}" in output
    if model_class is SACV:
        for name in ("value_loss", "value_mean", "qf_mean", "entropy"):
            assert f"    {name}" in output


@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_setup_can_be_delayed(model_class):
    model = small(model_class, box_env(), _init_setup_model=False)
    assert not hasattr(model, "actor")
    model._setup_model()
    model.learn(12)
    assert model._n_updates == 2


@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_env_by_name(model_class):
    model = model_class("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(net_arch=[8]), learning_starts=5, buffer_size=50)
    assert model.learn(8)._n_updates == 3


class OwnActor(Actor):
    """Its own way of sampling: the update must call it rather than sample for it."""

    n_calls = 0

    def action_log_prob(self, obs):
        OwnActor.n_calls += 1
        return super().action_log_prob(obs)


class OwnActorPolicy(sb3_softvalue.MlpPolicy):
    def make_actor(self, features_extractor=None):
        actor_kwargs = self._update_features_extractor(self.actor_kwargs, features_extractor)
        return OwnActor(**actor_kwargs).to(self.device)


def test_an_actor_that_samples_for_itself():
    """And from the same seed, it learns what the plain one learns."""
    plain, own = filled(box_env()), filled(box_env(), OwnActorPolicy)
    for model in (plain, own):
        th.manual_seed(0)
        np.random.seed(0)
        train(model, 3)
    assert OwnActor.n_calls == 3
    for name, param in parameters_of(plain.policy).items():
        th.testing.assert_close(parameters_of(own.policy)[name], param, rtol=1e-4, atol=1e-5)
    assert differs(parameters_of(plain.policy), parameters_of(filled(box_env()).policy))


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("n_observations", [1, 3])
def test_actions_are_sb3s_to_the_bit(n_observations, deterministic):
    """And so is the random number that is drawn next."""
    policy = filled(box_env()).policy
    observations = th.randn(n_observations, 3)
    drawn = []
    for predict in (policy._predict, lambda *args: SACPolicy._predict(policy, *args)):
        th.manual_seed(1)
        drawn.append(th.cat([predict(observations, deterministic).flatten(), th.rand(1)]))
    assert th.equal(*drawn)


def test_a_hook_of_the_actor_sees_every_prediction():
    model = filled(box_env())
    seen = []
    handle = model.actor.register_forward_hook(lambda module, args, actions: seen.append(actions.numpy()))
    actions, _ = model.policy.predict(np.zeros((2, 3), dtype=np.float32), deterministic=True)
    handle.remove()
    model.predict(np.zeros((2, 3), dtype=np.float32))
    assert len(seen) == 1
    np.testing.assert_array_equal(model.policy.unscale_action(seen[0]), actions)


@pytest.mark.parametrize("layer", ["mu", "log_std"])
def test_an_action_that_is_not_a_number_is_refused_as_by_sb3(layer):
    model = filled(box_env())
    with th.no_grad():
        getattr(model.actor, layer).bias[0] = th.nan
    with pytest.raises(ValueError, match="found invalid values"):
        model.predict(np.zeros(3, dtype=np.float32), deterministic=layer == "mu")


def test_large_samples_are_taken_in_bounded_chunks(monkeypatch):
    """Many gradient steps at once: few samples of the buffer, none larger than the bound."""
    model = filled(box_env())
    sizes = []
    sample = model.replay_buffer.sample
    model.replay_buffer.sample = lambda size, env=None: sizes.append(size) or sample(size, env=env)
    train(model, 10)
    assert sizes == [80]
    # A transition counts two observations of 3 numbers of 8 bytes: 48 bytes, 384 a batch
    monkeypatch.setattr("sb3_softvalue.execution.batches.CHUNK_BYTES", 3 * 384)
    sizes.clear()
    train(model, 10)
    assert sizes == [24, 24, 24, 8]
    # Less than a batch: one batch all the same
    monkeypatch.setattr("sb3_softvalue.execution.batches.CHUNK_BYTES", 1)
    sizes.clear()
    train(model, 2)
    assert sizes == [8, 8]


def test_own_replay_buffer_is_sampled_step_by_step():
    """A prioritized buffer, say, must see each batch's priorities in time."""
    sizes = []

    class OwnBuffer(ReplayBuffer):
        def sample(self, batch_size: int, env: Any = None) -> Any:
            sizes.append(batch_size)
            return super().sample(batch_size, env=env)

    model = filled(box_env(), replay_buffer_class=OwnBuffer)
    train(model, 3)
    assert sizes == [8, 8, 8]


@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_policy_replaced(model_class):
    """Another policy object is the one that learns."""
    model = small(model_class, box_env())
    model.learn(12)
    old = model.policy
    model.policy = copy.deepcopy(old)
    model._create_aliases()
    before = [parameters_of(old), parameters_of(model.policy)]
    train(model, 3)
    assert not differs(parameters_of(old), before[0])
    after = parameters_of(model.policy)
    assert all(not th.equal(after[name], before[1][name]) for name in after)
