"""A compiled update is the eager one, whatever is done to the model afterwards: to the bit, since Inductor is left out."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC
from torch import nn
from torch.nn.utils import parametrize, prune

from sb3_softvalue import SACV
from sb3_softvalue.execution import choice
from tests.helpers import assert_same, box_env, differs, everything, filled, parameters_of, small, train
from tests.scenarios import OwnExtractor, run

pytestmark = pytest.mark.usefixtures("compilations")
NETWORKS = ("actor", "critic", "value", "value_target")


def pair(**kwargs: Any) -> tuple[SACV, SACV]:
    """An eager and a compiled model."""
    eager, compiled = (filled(box_env(), execution=how, **kwargs) for how in ("eager", "compiled"))
    return eager, compiled


def assert_follows(models: tuple[SACV, SACV], *changes: Callable[[SACV], Any]) -> None:
    """Both train before and after each change, and are the same all the time."""
    for change in (lambda model: None, *changes):
        for model in models:
            change(model)
            run(model, (4, 1.0))
        assert_same(everything(models[1]), everything(models[0]))
    assert models[1]._resolved_execution == "compiled"


class Doubled(nn.Module):
    """A parametrization of a weight."""

    def forward(self, weight: th.Tensor) -> th.Tensor:
        return 2.0 * weight


def exchange_activation(model: SACV) -> None:
    model.actor.latent_pi[1] = nn.Tanh()


def exchange_layer(model: SACV) -> None:
    """The optimizer keeps the old one's parameters, as in SB3."""
    th.manual_seed(7)
    model.value.vf[0] = nn.Linear(3, 8)


def append_layer(model: SACV) -> None:
    model.critic.qf0.append(nn.Tanh())


def freeze_layer(model: SACV) -> None:
    model.critic.qf0[0].requires_grad_(False)


def release_layer(model: SACV) -> None:
    model.critic.qf0[0].requires_grad_(True)


def freeze_temperature(model: SACV) -> None:
    model.log_ent_coef.requires_grad_(False)


def change_slope(model: SACV) -> None:
    for network in NETWORKS:
        for module in getattr(model, network).modules():
            if isinstance(module, nn.LeakyReLU):
                module.negative_slope = 0.7


def other_storages(model: SACV) -> None:
    model.policy.load_from_vector(model.policy.parameters_to_vector() * 0.9)


def other_numbers(model: SACV) -> None:
    parameters = copy.deepcopy(model.get_parameters())
    for tensor in parameters["policy"].values():
        tensor.mul_(0.9)
    model.set_parameters(parameters)


def other_critic(model: SACV) -> None:
    th.manual_seed(7)
    critic = model.policy.make_critic()
    critic.optimizer = th.optim.Adam(critic.parameters(), lr=1e-3)
    model.critic = model.policy.critic = critic


def other_tensors(model: SACV) -> None:
    """Which no optimizer has, as in SB3: nothing but the temperature is learned from now on."""
    model.policy.load_state_dict(copy.deepcopy(model.policy.state_dict()), assign=True)


def other_batch_size(model: SACV) -> None:
    model.batch_size = 16


def other_prior(model: SACV) -> None:
    model.action_prior = "normal"


def other_temperature(model: SACV) -> None:
    model.ent_coef = 0.3
    model._setup_ent_coef()


def prune_layer(model: SACV) -> None:
    """Its weight is computed by a hook."""
    prune.l1_unstructured(model.actor.mu, "weight", 0.3)


def parametrize_layer(model: SACV) -> None:
    parametrize.register_parametrization(model.critic.qf0[0], "weight", Doubled())


def own_forward(model: SACV) -> None:
    forward = model.value.vf.forward
    model.value.vf.forward = lambda features: 2.0 * forward(features)


def own_method(model: SACV) -> None:
    of_actor = model.actor.get_action_dist_params

    def narrower(obs: Any) -> Any:
        mean, log_std, kwargs = of_actor(obs)
        return mean, log_std - 1.0, kwargs

    model.actor.get_action_dist_params = narrower


def other_approximation(model: SACV) -> None:
    for module in model.policy.modules():
        if isinstance(module, nn.GELU):
            module.approximate = "tanh"


def append_norm(model: SACV) -> None:
    model.critic.qf0.insert(1, nn.LayerNorm(8))


def other_epsilon(model: SACV) -> None:
    model.critic.qf0[1].eps = 0.5


def transpose_weight(model: SACV) -> None:
    """In the same place."""
    weight = model.critic.qf0[2].weight
    weight.data = weight.data.t()


def fewer_critics(model: SACV) -> None:
    model.critic.q_networks.pop()


class Halved(nn.Linear):
    """A layer of another class."""

    def forward(self, features: th.Tensor) -> th.Tensor:
        return 0.5 * super().forward(features)


def other_class(model: SACV) -> None:
    model.critic.qf0[0].__class__ = Halved


LEAKY = dict(policy_kwargs=dict(net_arch=[8], activation_fn=nn.LeakyReLU))
CHANGES: dict[str, tuple[dict[str, Any], list[Callable[[SACV], Any]]]] = {
    "layers": ({}, [exchange_activation, exchange_layer, append_layer]),
    "frozen, released": ({}, [freeze_layer, release_layer, freeze_temperature]),
    "SGD, frozen, released": (
        dict(policy_kwargs=dict(net_arch=[8], optimizer_class=th.optim.SGD)),
        [freeze_layer, release_layer],
    ),
    "tensors": ({}, [other_storages, other_numbers, other_storages]),
    "tensors that no optimizer has": ({}, [other_tensors]),
    "tensors that no optimizer has, fixed temperature": (dict(ent_coef=0.1), [other_tensors]),
    "slope": (LEAKY, [change_slope]),
    "network": ({}, [other_critic, other_batch_size]),
    "numbers": ({}, [other_batch_size, other_prior, other_temperature]),
    "numbers, delayed policy": (dict(policy_delay=2), [other_batch_size, exchange_activation]),
    "computed weights": ({}, [prune_layer, parametrize_layer]),
    "forward": ({}, [own_forward]),
    "method": ({}, [own_method]),
    "critics": ({}, [fewer_critics]),
    "class": ({}, [other_class]),
    "approximation": (dict(policy_kwargs=dict(net_arch=[8], activation_fn=nn.GELU)), [other_approximation]),
    "epsilon": ({}, [append_norm, other_epsilon]),
    "transposed": (dict(policy_kwargs=dict(net_arch=[8, 8])), [transpose_weight]),
}


@pytest.mark.parametrize("kwargs, changes", CHANGES.values(), ids=CHANGES)
def test_a_change_after_the_first_updates_is_seen(kwargs, changes):
    assert_follows(pair(**kwargs), *changes)


def each_extractor(change: Callable[[Any], Any]) -> Callable[[SACV], None]:
    def changed(model: SACV) -> None:
        for network in NETWORKS:
            change(getattr(model, network).features_extractor)

    return changed


def test_a_change_of_an_own_module_is_seen():
    """Its buffers and attributes, which may be anything."""
    assert_follows(
        pair(policy_kwargs=dict(net_arch=[8], features_extractor_class=OwnExtractor)),
        each_extractor(lambda extractor: setattr(extractor, "factor", 0.5)),
        each_extractor(lambda extractor: setattr(extractor, "mean", th.full((3,), 0.5))),
        each_extractor(lambda extractor: extractor.mean.fill_(-0.5)),
        each_extractor(lambda extractor: setattr(extractor, "factor", th.tensor([1.0, 2.0, 3.0]))),
        other_batch_size,
    )


def test_a_frozen_layer_stays_and_a_released_one_learns():
    for model in pair(ent_coef=0.1):
        run(model, (3, 1.0))
        for requires_grad in (False, True):
            model.actor.latent_pi.requires_grad_(requires_grad)
            frozen, free = parameters_of(model.actor.latent_pi), parameters_of(model.actor.mu)
            run(model, (3, 1.0))
            assert differs(model.actor.latent_pi.state_dict(), frozen) == requires_grad
            assert differs(model.actor.mu.state_dict(), free)


def test_going_back_compiles_nothing(compilations):
    """Freezing a layer and releasing it, or two batch sizes in turn, needs two graphs."""
    model = filled(box_env(), execution="compiled")
    for change in (freeze_layer, release_layer) * 3:
        run(model, (3, 1.0))
        change(model)
    assert len(compilations) == 2


class TestHooks:
    """What the user runs in the middle of an update is run at each."""

    def test_of_a_gradient(self, monkeypatch):
        """Registered before the first update: the critics do not learn, the others do. As "auto" has it, too."""
        monkeypatch.setattr(choice, "BREAK_EVEN_UPDATES", 5)
        monkeypatch.setattr(choice, "EAGER_UPDATES", 0)
        for execution in ("eager", "compiled", "auto"):
            model = filled(box_env(), execution=execution)
            for param in model.critic.parameters():
                param.register_hook(lambda gradient: gradient * 0)
            critic, value = parameters_of(model.critic), parameters_of(model.value)
            run(model, (8, 1.0))
            assert not differs(model.critic.state_dict(), critic) and differs(model.value.state_dict(), value), execution
            assert model._resolved_execution == ("eager" if execution == "eager" else "compiled")

    @pytest.mark.parametrize("extractor", [{}, dict(features_extractor_class=OwnExtractor)])
    def test_come_and_go(self, extractor):
        """Of each kind, after the first compiled updates: counted, and felt."""
        counts: dict[str, int] = {}
        handles: dict[str, Any] = {}

        def count(name: str, result: Any = None) -> Callable[..., Any]:
            def hook(*args: Any) -> Any:
                counts[name] = counts.get(name, 0) + 1
                return None if result is None else result(*args)

            return hook

        def add(kind: str) -> Callable[[SACV], None]:
            def added(model: SACV) -> None:
                name, layer = f"{model.execution} {kind}", model.critic.qf0[2]
                handles[name] = {
                    "gradient": lambda: layer.weight.register_hook(count(name, lambda gradient: 0.5 * gradient)),
                    "forward": lambda: layer.register_forward_hook(count(name, lambda _, inputs, output: 2.0 * output)),
                    "pre": lambda: layer.register_forward_pre_hook(count(name, lambda _, inputs: (2.0 * inputs[0],))),
                    "backward": lambda: layer.register_full_backward_hook(count(name)),
                    "temperature": lambda: model.log_ent_coef.register_hook(count(name, lambda gradient: 0 * gradient)),
                }[kind]()

            return added

        def remove(kind: str) -> Callable[[SACV], None]:
            return lambda model: handles[f"{model.execution} {kind}"].remove()

        kinds = ("gradient", "forward", "pre", "backward", "temperature")
        changes = [change(kind) for kind in kinds for change in (add, remove)]
        assert_follows(pair(policy_kwargs=dict(net_arch=[8]) | extractor), *changes)
        for kind in kinds:
            assert counts[f"compiled {kind}"] == counts[f"eager {kind}"] >= 4, kind


def test_a_change_of_all_modules_is_seen(monkeypatch):
    """A hook on every module, and the method of a class."""
    models = pair()
    assert_follows(models)
    before = parameters_of(models[1].critic)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: 0.5 * output if isinstance(module, nn.Linear) else None
    )
    assert_follows(models)
    handle.remove()
    assert_follows(models)
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda layer, features: 0.5 * forward(layer, features))
    assert_follows(models)
    assert differs(models[1].critic.state_dict(), before)


COPIES: dict[str, Callable[[SACV], SACV]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "cloudpickle": lambda model: cloudpickle.loads(cloudpickle.dumps(model)),
}


@pytest.mark.parametrize("extractor", [{}, dict(features_extractor_class=OwnExtractor)])
def test_copies(extractor):
    """Before and after the compilation: a copy trains as the original does, and neither changes the other."""
    eager, original = pair(policy_kwargs=dict(net_arch=[8]) | extractor)
    early = copy.deepcopy(original)
    for model in (eager, original):
        run(model, (4, 1.0))
    copies = {name: copied(original) for name, copied in COPIES.items()}
    before = everything(copies["deepcopy"])
    run(original, (4, 1.0))
    assert_same(everything(copies["deepcopy"]), before)
    run(early, (4, 1.0))
    for model in (eager, early, *copies.values()):
        run(model, (4, 1.0))
    other_batch_size(eager)
    run(eager, (3, 1.0))
    for model in (original, early, *copies.values()):
        other_batch_size(model)
        run(model, (3, 1.0))
        assert model._resolved_execution == "compiled"
        assert_same(everything(model), everything(eager))


def test_more_models_than_dynamo_has_graphs_for_a_function(compilations):
    """Its limit is eight for each code object."""
    assert th._dynamo.config.recompile_limit == 8
    for width in range(2, 11):
        models = pair(policy_kwargs=dict(net_arch=[width]))
        for model in models:
            run(model, (3, 1.0))
        assert_same(everything(models[1]), everything(models[0]))
    assert len(compilations) == 9


def test_more_networks_than_dynamo_has_graphs_for_a_function(compilations):
    """Of one model."""
    models = pair(policy_kwargs=dict(net_arch=[2]))
    assert_follows(models, *[other_critic] * 8)
    assert len(compilations) == 9


def test_models_alike_in_shape_are_told_apart():
    for activation in (nn.ReLU, nn.Tanh):
        models = pair(policy_kwargs=dict(net_arch=[8], activation_fn=activation))
        assert_follows(models)


def test_a_model_ends_with_its_last_reference():
    """Compiled functions do not keep it."""
    model = filled(box_env(), execution="compiled")
    train(model, 4)
    gone = [weakref.ref(module) for module in (model.actor, model.critic, model.value)]
    del model
    gc.collect()
    assert not any(ref() for ref in gone)


def test_distributions_are_still_validated():
    """Dynamo switches it off for the whole process: SB3's policies would act on NaN."""
    train(filled(box_env(), execution="compiled"), 3)
    policy = small(SAC, box_env()).policy
    with th.no_grad():
        policy.actor.mu.bias.fill_(th.nan)
    with pytest.raises(ValueError, match="Expected parameter loc"):
        policy.predict(np.zeros(3, dtype=np.float32))
