"""Batches of several gradient steps from one sample of the buffer."""

import pytest
import torch as th

from sb3_softvalue.execution.batches import send, split
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
