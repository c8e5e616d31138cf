"""Batches of several gradient steps from one sample of the buffer."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer

from sb3_softvalue.execution.batches import copy_to_device, sample_batches, split
from sb3_softvalue.objective import Batch, map_tensors
from tests.helpers import assert_same

CPU = th.device("cpu")


def leaves(batch: Batch) -> list[th.Tensor]:
    found: list[th.Tensor] = []
    map_tensors(found.append, batch)
    return found


def test_split_takes_a_stride():
    # HerReplayBuffer puts real transitions before virtual ones: a contiguous half would hold one kind only
    rows = th.arange(6.0).reshape(-1, 1)
    batch = Batch({"key": rows}, rows, {"key": rows}, rows, rows, rows / 10)
    first, second = split(batch, 2)
    for part, expected in ((first, [0.0, 2.0, 4.0]), (second, [1.0, 3.0, 5.0])):
        assert part.rewards.flatten().tolist() == expected
        assert part.observations["key"].flatten().tolist() == expected
        assert th.equal(part.discounts, part.rewards / 10)
        assert all(leaf.is_contiguous() for leaf in leaves(part))


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if th.cuda.is_available() else [])])
def test_send_changes_nothing(device):
    """All types that buffers give, of sizes that do not end on a boundary of alignment."""
    observations = {
        "vector": th.randn(3, 5, dtype=th.float64),
        "image": th.randint(255, (3, 3, 5, 7), dtype=th.uint8),
        "number": th.arange(3),
    }
    next_observations = {key: tensor + 1 for key, tensor in observations.items()}
    actions, dones, rewards, discounts = th.randn(3, 2), th.ones(3, 1), th.randn(3, 1), th.rand(3, 1)
    batches = [
        Batch(observations, actions, next_observations, dones, rewards, discounts),
        Batch(next_observations, -actions, observations, 1 - dones, -rewards, 1 - discounts),
    ]
    sent = copy_to_device(batches, th.device(device))
    for batch, expected in zip(sent, batches, strict=True):
        assert list(batch.observations) == list(observations)
        assert [leaf.dtype for leaf in leaves(batch)] == [leaf.dtype for leaf in leaves(expected)]
        assert all(leaf.device.type == device and leaf.is_contiguous() for leaf in leaves(batch))
        assert_same([leaf.cpu() for leaf in leaves(batch)], leaves(expected))


OBSERVATIONS = [
    spaces.Box(-1.0, 1.0, (17,), np.float64),
    spaces.Box(-1.0, 1.0, (2, 3), np.float32),
    spaces.Box(0, 255, (3, 4, 5), np.uint8),
    spaces.Discrete(4),
    spaces.MultiBinary(3),
]


def buffer_of(
    observation_space: spaces.Space,
    n_envs: int = 1,
    n_added: int = 25,
    buffer_class: type[ReplayBuffer] = ReplayBuffer,
    **kwargs: Any,
) -> ReplayBuffer:
    """Of 20 random transitions for each environment at most."""
    action_space = spaces.Box(-1.0, 1.0, (2,))
    buffer = buffer_class(20 * n_envs, observation_space, action_space, "cpu", n_envs, **kwargs)
    generator = np.random.default_rng(0)
    for _ in range(n_added):
        observations, next_observations = (np.stack([observation_space.sample() for _ in range(n_envs)]) for _ in range(2))
        infos = [{"TimeLimit.truncated": bool(generator.integers(2))} for _ in range(n_envs)]
        actions, rewards = generator.normal(size=(n_envs, 2)), generator.normal(size=n_envs)
        buffer.add(observations, next_observations, actions, rewards, generator.integers(2, size=n_envs), infos)
    return buffer


@pytest.mark.parametrize("observation_space", OBSERVATIONS, ids=str)
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("n_added", [4, 25])
def test_rows_are_those_of_the_plain_buffer(observation_space, n_envs, n_added):
    """Same rows, same types, and the random generator afterwards where SB3's sampling leaves it."""
    buffer = buffer_of(observation_space, n_envs, n_added)
    np.random.seed(1)
    expected = buffer.sample(64)
    after = np.random.rand()
    np.random.seed(1)
    (batch,) = sample_batches(buffer, 1, 64, 0.9, 1.0, CPU)
    assert np.random.rand() == after
    ours = (batch.observations, batch.actions, batch.next_observations, batch.dones, batch.rewards)
    for tensor, expected_tensor in zip(ours, expected[:5], strict=True):
        assert tensor.dtype == expected_tensor.dtype and tensor.shape == expected_tensor.shape
        assert th.equal(tensor, expected_tensor)
    assert set(batch.dones.flatten().tolist()) == {0.0, 1.0}
    assert th.equal(batch.discounts, th.full((64, 1), 0.9))


def test_rewards_are_scaled():
    buffer = buffer_of(OBSERVATIONS[0])
    np.random.seed(1)
    (plain,) = sample_batches(buffer, 1, 64, 0.9, 1.0, CPU)
    np.random.seed(1)
    (scaled,) = sample_batches(buffer, 1, 64, 0.9, 2.5, CPU)
    assert th.equal(scaled.rewards, 2.5 * plain.rewards)
    assert_same(scaled._replace(rewards=plain.rewards), plain)


@pytest.mark.parametrize("n_batches", [1, 5])
def test_discounts_of_n_steps_are_the_buffers(n_batches):
    buffer = buffer_of(OBSERVATIONS[0], buffer_class=NStepReplayBuffer, n_steps=3, gamma=0.5)
    np.random.seed(1)
    expected = buffer.sample(64 * n_batches).discounts
    np.random.seed(1)
    batches = list(sample_batches(buffer, n_batches, 64, 0.9, 1.0, CPU))
    assert len(expected.unique()) > 1
    for index, batch in enumerate(batches):
        assert th.equal(batch.discounts, expected[index::n_batches])


class OwnSamples(NamedTuple):
    """Other fields than SB3's, in another order."""

    rewards: Any
    next_observations: Any
    observations: Any
    actions: Any
    weights: Any
    dones: Any


class OwnBuffer(ReplayBuffer):
    n_calls = 0

    def sample(self, batch_size: int, env: Any = None) -> Any:
        self.n_calls += 1
        samples = super().sample(batch_size, env)
        fields = {name: getattr(samples, name) for name in OwnSamples._fields if name != "weights"}
        return OwnSamples(**fields, weights=th.ones(batch_size))


def test_an_own_buffer_is_asked_for_each_batch():
    """Since it may draw the rows of a batch together; its fields are taken by name."""
    buffer = buffer_of(OBSERVATIONS[0], buffer_class=OwnBuffer)
    batches = list(sample_batches(buffer, 4, 64, 0.9, 1.0, CPU))
    assert buffer.n_calls == len(batches) == 4
    for batch in batches:
        assert batch.observations.shape == batch.next_observations.shape == (64, 17)
        assert batch.actions.shape == (64, 2)
        assert batch.rewards.shape == batch.dones.shape == batch.discounts.shape == (64, 1)
        assert set(batch.dones.flatten().tolist()) == {0.0, 1.0}


def test_large_samples_are_cut(monkeypatch):
    """Few large samples make up the batches, none of them larger than allowed."""
    sizes: list[int] = []
    sample = ReplayBuffer.sample
    monkeypatch.setattr(ReplayBuffer, "sample", lambda self, size, env=None: (sizes.append(size), sample(self, size, env))[1])
    monkeypatch.setattr("sb3_softvalue.execution.batches.CHUNK_BYTES", 4 * 64 * 2 * 8 * 17)
    batches = list(sample_batches(buffer_of(OBSERVATIONS[0]), 10, 64, 0.9, 1.0, CPU))
    assert sizes == [256, 256, 128] and [len(batch.rewards) for batch in batches] == [64] * 10
