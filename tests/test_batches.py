"""Batches of several gradient steps from one sample of the buffer."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer

from sb3_softvalue.execution.batches import sample_batches, send, split
from sb3_softvalue.update import Batch
from tests.helpers import assert_same


def test_split_takes_a_stride():
    # HerReplayBuffer puts real transitions before virtual ones: a contiguous half would hold one kind only
    rows = th.arange(6.0).reshape(-1, 1)
    batch = Batch({"key": rows}, rows, {"key": rows}, rows, rows, 0.5)
    first, second = split(batch, 2)
    for part, expected in ((first, [0.0, 2.0, 4.0]), (second, [1.0, 3.0, 5.0])):
        assert part.rewards.flatten().tolist() == expected
        assert part.observations["key"].flatten().tolist() == expected
        assert part.rewards.is_contiguous()
        assert part.discounts == 0.5
    n_step = split(batch._replace(discounts=rows), 3)
    assert [part.discounts.flatten().tolist() for part in n_step] == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if th.cuda.is_available() else [])])
def test_send_changes_nothing(device):
    """All types that buffers give, of sizes that do not end on a boundary of alignment."""
    observations = {
        "vector": th.randn(3, 5, dtype=th.float64),
        "image": th.randint(255, (3, 3, 5, 7), dtype=th.uint8),
        "number": th.arange(3),
    }
    next_observations = {key: tensor + 1 for key, tensor in observations.items()}
    actions, dones, rewards = th.randn(3, 2), th.ones(3, 1), th.randn(3, 1)
    batches = [
        Batch(observations, actions, next_observations, dones, rewards, 0.5),
        Batch(next_observations, -actions, observations, 1 - dones, -rewards, 0.5),
    ]
    sent = send(batches, th.device(device))
    for batch, expected in zip(sent, batches, strict=True):
        assert [leaf.dtype for leaf in batch.leaves()[:-1]] == [leaf.dtype for leaf in expected.leaves()[:-1]]
        assert all(leaf.device.type == device and leaf.is_contiguous() for leaf in batch.leaves()[:-1])
        assert_same([leaf.cpu() for leaf in batch.leaves()[:-1]], expected.leaves()[:-1])
        assert batch.discounts == 0.5


OBSERVATIONS = [
    spaces.Box(-1.0, 1.0, (17,), np.float64),
    spaces.Box(-1.0, 1.0, (2, 3), np.float32),
    spaces.Box(0, 255, (3, 4, 5), np.uint8),
    spaces.Discrete(4),
    spaces.MultiBinary(3),
]


@pytest.mark.parametrize("observation_space", OBSERVATIONS, ids=str)
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("n_added", [4, 25])
def test_rows_are_those_of_the_plain_buffer(observation_space, n_envs, n_added):
    """Same rows, same types, and the random generator afterwards where SB3's sampling leaves it."""
    action_space = spaces.Box(-1.0, 1.0, (2,))
    buffer = ReplayBuffer(20 * n_envs, observation_space, action_space, "cpu", n_envs)
    generator = np.random.default_rng(0)
    for _ in range(n_added):
        observations, next_observations = (np.stack([observation_space.sample() for _ in range(n_envs)]) for _ in range(2))
        infos = [{"TimeLimit.truncated": bool(generator.integers(2))} for _ in range(n_envs)]
        actions, rewards = generator.normal(size=(n_envs, 2)), generator.normal(size=n_envs)
        buffer.add(observations, next_observations, actions, rewards, generator.integers(2, size=n_envs), infos)
    np.random.seed(1)
    expected = buffer.sample(64)
    after = np.random.rand()
    np.random.seed(1)
    (batch,) = sample_batches(buffer, 1, 64, 0.9, th.device("cpu"))
    assert np.random.rand() == after
    ours = (batch.observations, batch.actions, batch.next_observations, batch.dones, batch.rewards)
    for tensor, expected_tensor in zip(ours, expected[:5], strict=True):
        assert tensor.dtype == expected_tensor.dtype and tensor.shape == expected_tensor.shape
        assert th.equal(tensor, expected_tensor)
    assert set(batch.dones.flatten().tolist()) == {0.0, 1.0} and batch.discounts == 0.9
