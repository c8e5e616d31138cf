"""Batches for several gradient steps, taken from SB3's replay buffers in few large samples and sent in one copy each."""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_softvalue.update import Batch

# Buffers that draw each transition by itself, so that one large sample is as good as several small ones
_CHUNKED_BUFFERS = (ReplayBuffer, DictReplayBuffer, NStepReplayBuffer, HerReplayBuffer)
# Largest sample taken from the buffer in one go
CHUNK_BYTES = 32 * 1024**2
# Batches that go to a GPU in one copy, while it works on those before
_SENT_TOGETHER = 8


def sample_batches(
    buffer: ReplayBuffer,
    n_batches: int,
    batch_size: int,
    gamma: float,
    device: th.device,
    env: VecNormalize | None = None,
) -> Iterator[Batch]:
    """
    Draw the batches of several gradient steps.

    :param buffer: to sample from; the random numbers are the buffer's own
    :param n_batches: how many
    :param batch_size: transitions in each
    :param gamma: discount where the buffer has none of its own
    :param device: of the batches
    :param env: to normalize observations and rewards with
    :return: batches in memory of their own, each like a single sample of the buffer
    """
    chunk = 1
    if type(buffer) in _CHUNKED_BUFFERS:
        chunk = max(1, CHUNK_BYTES // (batch_size * _transition_bytes(buffer.observation_space)))
    while n_batches > 0:
        size = min(chunk, n_batches)
        if device.type == "cuda":
            batches = split(_sample_on_cpu(buffer, size * batch_size, gamma, env), size)
            while sending := list(itertools.islice(batches, _SENT_TOGETHER)):
                yield from send(sending, device)
        else:
            yield from split(_sample(buffer, size * batch_size, gamma, env), size)
        n_batches -= size


def _sample(buffer: ReplayBuffer, size: int, gamma: float, env: VecNormalize | None) -> Batch:
    """:return: one sample of the buffer, with discounts"""
    is_plain = (
        type(buffer) is ReplayBuffer
        and not buffer.optimize_memory_usage
        and not {"sample", "_get_samples"} & set(vars(buffer))
    )
    if is_plain and env is None and buffer.device.type == "cpu":
        return _sample_rows(buffer, size, gamma)
    samples = buffer.sample(size, env=env)
    return Batch(*samples[:5], gamma if samples.discounts is None else samples.discounts)


def _sample_rows(buffer: ReplayBuffer, size: int, gamma: float) -> Batch:
    """
    :return: what the plain buffer's ``sample`` gives, by the same random numbers, each array read once and by rows instead of
        by pairs of indices
    """
    steps = np.random.randint(0, buffer.buffer_size if buffer.full else buffer.pos, size=size)
    rows = steps * buffer.n_envs + np.random.randint(0, high=buffer.n_envs, size=(size,))

    def take(array: np.ndarray) -> th.Tensor:
        # Faster than PyTorch's index_select; the copy is aligned as PyTorch's own tensors are, for the products' sake
        return th.from_numpy(array.reshape(-1, *array.shape[2:]).take(rows, axis=0)).clone()

    # Only use dones that are not due to timeouts
    dones = take(buffer.dones) * (1 - take(buffer.timeouts))
    return Batch(
        observations=take(buffer.observations),
        actions=take(buffer.actions),
        next_observations=take(buffer.next_observations),
        dones=dones.unsqueeze(1),
        rewards=take(buffer.rewards).unsqueeze(1),
        discounts=gamma,
    )


def _sample_on_cpu(buffer: ReplayBuffer, size: int, gamma: float, env: VecNormalize | None) -> Batch:
    """:return: one sample of the buffer that stays on the CPU, where the buffer would send each of its tensors by itself"""
    device, buffer.device = buffer.device, th.device("cpu")
    try:
        return _sample(buffer, size, gamma, env)
    finally:
        buffer.device = device


def split(batch: Batch, n_batches: int) -> Iterator[Batch]:
    """
    Split a large sample into batches that are each like a sample of their own. Taken with a stride, because
    ``HerReplayBuffer`` puts real transitions before virtual ones.

    :param batch: n_batches * batch_size transitions
    :param n_batches: number of parts
    :return: batches of batch_size transitions, contiguous in memory
    """

    def part(leaf: th.Tensor | float, index: int) -> th.Tensor | float:
        return leaf[index::n_batches].contiguous() if isinstance(leaf, th.Tensor) else leaf

    if n_batches == 1:
        yield batch
    else:
        yield from (batch.with_leaves(part(leaf, index) for leaf in batch.leaves()) for index in range(n_batches))


def send(batches: Sequence[Batch], device: th.device) -> list[Batch]:
    """
    Send batches to a GPU in one copy for each type of number, from pinned memory and without waiting for it: the copy of each
    small tensor by itself costs a launch and a synchronization.

    :param batches: on the CPU, or where a buffer of one's own has put them
    :param device: where to
    :return: the same batches there
    """
    leaves = [leaf for batch in batches for leaf in batch.leaves()]
    by_type: dict[th.dtype, list[int]] = {}
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, th.Tensor) and leaf.device.type == "cpu":
            by_type.setdefault(leaf.dtype, []).append(place)
        elif isinstance(leaf, th.Tensor):
            leaves[place] = leaf.to(device)
    for dtype, places in by_type.items():
        flat = [leaves[place].reshape(-1) for place in places]
        sizes = [len(leaf) for leaf in flat]
        packed = th.empty(sum(sizes), dtype=dtype, pin_memory=device.type == "cuda")
        th.cat(flat, out=packed)
        for place, part in zip(places, packed.to(device, non_blocking=True).split(sizes), strict=True):
            leaves[place] = part.view(leaves[place].shape)
    sent = iter(leaves)
    return [batch.with_leaves(itertools.islice(sent, len(batch.leaves()))) for batch in batches]


def _transition_bytes(observation_space: spaces.Space) -> int:
    """
    :return: about how many bytes the two observations of a transition take
    """
    if isinstance(observation_space, spaces.Dict):
        return sum(_transition_bytes(space) for space in observation_space.values())
    return 2 * 8 * max(1, math.prod(observation_space.shape or ()))
